import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmpt.stream import Rows, StreamBuilder
from mmpt.train.loss import MAX_LOGITS, NextToken, cross_entropy
from mmpt.vocab import Modality


@pytest.fixture
def rows(vocabulary):
    """Three rows of several documents each, with every medium and some padding."""
    rng = np.random.default_rng(0)

    def stream():
        builder = StreamBuilder(vocabulary).structure("<bod>", weight=0.0)
        builder.text(rng.integers(0, 300, rng.integers(1, 9)))
        builder.media(Modality.IMAGE, rng.integers(0, 64, (2, 3)))
        builder.media(Modality.SPEECH, rng.integers(0, 512, 5))
        return builder.structure("<eod>").build()

    return Rows.pack([[stream(), stream()] for _ in range(3)], 64, vocabulary.structure_id("<pad>"))


@pytest.fixture
def model(model):
    return model.double()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_gradients(model, objective, batches):
    model.zero_grad()
    prepared = [objective.prepare(rows, generators(rows)) for rows in batches]
    weight = sum(float(batch.weight.sum(dtype=torch.float64)) for batch in prepared)
    total = 0.0
    for batch in prepared:
        losses = objective.losses(model, batch)
        (losses.total / weight).backward()
        total += float(losses.total.detach()) / weight
    return total, gradients(model)


def pick(rows, numbers):
    """Some of the rows; nothing here reads the span table."""
    return Rows(
        rows.ids[numbers],
        rows.modality[numbers],
        rows.document[numbers],
        rows.position[numbers],
        rows.loss_weight[numbers],
        rows.spans[:0],
    )


def generators(rows):
    return [torch.Generator().manual_seed(number) for number in range(len(rows.ids))]


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_give_the_values_and_gradients_of_the_plain_loss(chunk, z_loss):
    generator = torch.Generator().manual_seed(0)
    shapes = ((50, 8), (30, 8))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    hidden, head = (x.requires_grad_() for x in inputs)
    targets = torch.randint(30, (50,), generator=generator)
    weights = torch.rand(50, generator=generator, dtype=torch.float64)

    logits = hidden @ head.T
    expected_nll = F.cross_entropy(logits, targets, reduction="none")
    expected = (weights * (expected_nll + z_loss * logits.logsumexp(-1) ** 2)).sum()
    wanted = torch.autograd.grad(3 * expected, (hidden, head))

    total, nll = cross_entropy(hidden, head, targets, weights, z_loss=z_loss, chunk=chunk)
    got = torch.autograd.grad(3 * total, (hidden, head))
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do():
    hidden = torch.randn(5, 4, requires_grad=True)
    head = torch.randn(9, 4)
    total, _ = cross_entropy(hidden, head, torch.arange(5), torch.ones(5))
    total.backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_no_positions_give_zero(model, rows):
    rows.loss_weight.zero_()
    objective = NextToken()
    losses = objective.losses(model, objective.prepare(rows, generators(rows)))
    assert losses.total.item() == 0
    losses.total.backward()


def test_the_loss_is_that_of_every_document_alone(model, rows, vocabulary):
    objective = NextToken()
    packed = objective.losses(model, objective.prepare(rows, generators(rows)))
    total, count = 0.0, 0
    for row in range(len(rows.ids)):
        for number in range(int(rows.document[row].max()) + 1):
            place = rows.document[row] == number
            ids, modality = rows.ids[row][place][None], rows.modality[row][place][None]
            scores = model.logits(model(ids, modality=modality))[0, :-1]
            weight = rows.loss_weight[row][place][1:]
            nll = F.cross_entropy(scores, ids[0, 1:], reduction="none")
            total += float((nll * weight).sum().detach())
            count += int((weight > 0).sum())
    assert packed.total.item() == pytest.approx(total, rel=1e-10)
    assert packed.nats.sum().item() == pytest.approx(total, rel=1e-10)
    assert packed.counts.sum().item() == count


def test_sums_by_modality_are_those_of_the_predicted_ids(model, rows):
    objective = NextToken()
    losses = objective.losses(model, objective.prepare(rows, generators(rows)))
    assert losses.counts[Modality.IMAGE] == (rows.modality == Modality.IMAGE).sum()
    assert losses.counts[Modality.SPEECH] == (rows.modality == Modality.SPEECH).sum()
    assert losses.counts[Modality.VIDEO] == 0


def test_gradients_do_not_depend_on_how_a_step_is_divided(model, rows):
    objective = NextToken({"image": 0.3})
    loss, whole = step_gradients(model, objective, [rows])
    splits = [[[0], [1], [2]], [[0, 1], [2]], [[2, 0], [1]]]
    for split in splits:
        other_loss, other = step_gradients(model, objective, [pick(rows, part) for part in split])
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for name, gradient in whole.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)


def test_weights_by_modality_count(model, rows):
    def only(name):
        weights = dict.fromkeys(("text", "image", "video", "speech"), 0.0) | {name: 1.0}
        objective = NextToken(weights)
        return objective.losses(model, objective.prepare(rows, generators(rows)))

    everything = NextToken()
    whole = everything.losses(model, everything.prepare(rows, generators(rows)))
    parts = [only(name) for name in ("text", "image", "video", "speech")]
    assert sum(part.total for part in parts).item() == pytest.approx(whole.total.item())
    for modality, part in zip(Modality, parts, strict=True):
        assert part.counts.sum() == part.counts[modality]


class Largest(TorchDispatchMode):
    """The largest tensor that anything gave, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *(each.numel() for each in tensors)])
        return out


def test_logits_of_a_large_vocabulary_are_never_whole():
    hidden = torch.randn(200, 4, requires_grad=True)
    head = torch.randn(280_000, 4, requires_grad=True)
    targets, weights = torch.arange(200), torch.ones(200)
    with Largest() as seen:
        total, _ = cross_entropy(hidden, head, targets, weights)
        total.backward()
    assert seen.elements <= MAX_LOGITS < 200 * 280_000
    assert head.grad is not None
