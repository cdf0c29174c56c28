import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpt.stream import Rows
from mmpt.train.flops import Flops, count_ids, measure_peak
from mmpt.vocab import Modality

LENGTH = 24
NONE = torch.zeros(4)


@pytest.fixture
def rows():
    """A document of 16 ids of text, one of 4 of image, and pads."""
    document = torch.tensor([[0] * 16 + [1] * 4 + [-1] * 4])
    position = torch.tensor([[*range(16), *range(4), 0, 0, 0, 0]])
    modality = torch.where(document == 1, Modality.IMAGE, Modality.TEXT)
    ids = torch.zeros_like(document)
    return Rows(ids, modality, document, position, torch.ones(1, LENGTH), torch.zeros(0, 7).long())


def test_ids_and_the_keys_they_see_are_counted_without_pads(rows):
    ids, keys = count_ids([rows, rows])
    assert ids.tolist() == [32, 8, 0, 0]
    assert keys.tolist() == [2 * 16 * 17 / 2, 2 * 4 * 5 / 2, 0, 0]


def test_a_step_counts_what_pytorch_counts(model, rows):
    """But attention: whole squares are computed where half of them count."""
    text = Rows(
        rows.ids[:, :16],
        rows.modality[:, :16],
        rows.document[:, :16],
        rows.position[:, :16],
        rows.loss_weight[:, :16],
        rows.spans,
    )
    model.train()
    with FlopCounterMode(display=False) as counter:
        hidden = model(text.ids, modality=text.modality)
        model.logits(hidden).sum().backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if "scaled_dot" not in op)
    read = count_ids([text])
    read[1] = 0  # no keys
    ours = Flops(model).of_step(read, NONE)
    assert set(ours) == {"text"}
    # the norms' scales count as products with us; the lookup of ids has no gradient product
    assert ours["text"] == pytest.approx(products, rel=0.02)


def test_keys_add_four_operations_for_each_width_and_layer(model, rows):
    flops, read = Flops(model), count_ids([rows])
    without = read.clone()
    without[1] = 0
    more = flops.of_step(read, NONE)["image"] - flops.of_step(without, NONE)["image"]
    assert more == 3 * 4 * model.config.width * model.config.num_layers * (4 * 5 / 2)


def test_adaptation_reads_clean_ids_once_and_learns_from_noisy_ones(model, rows):
    read, image = count_ids([rows]), Modality.IMAGE
    learned = Flops(model).of_step(read, NONE)
    model.add_noisy_groups()
    model.freeze_for_adaptation()
    flops = Flops(model)
    assert flops.of_step(read, NONE) == {name: n // 3 for name, n in learned.items()}
    noisy = flops.of_step(read, torch.tensor([0, 4, 0, 0]))["image"] - learned["image"] // 3
    mean = 5 / 2
    one = model.flops_per_token(image, noisy=True)
    keys = model.flops_per_token(image, context=2, noisy=True) - one
    assert noisy == pytest.approx(3 * 4 * (one + keys / 2 * mean), abs=1)
    model.requires_grad_()  # clean ids are learned from beside them
    both = Flops(model).of_step(read, torch.tensor([0, 4, 0, 0]))
    assert both == {"text": learned["text"], "image": learned["image"] + noisy}


def test_the_peak_is_measured_once_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    peak = measure_peak(torch.device("cpu"), torch.float32)
    assert peak > 1e9
    assert measure_peak(torch.device("cpu"), torch.float32) == peak
    assert torch.equal(torch.get_rng_state(), before)
