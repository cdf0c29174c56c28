from dataclasses import fields

import numpy as np
import pytest
import torch

from mmpt.decode.ar import Prefix
from mmpt.decode.dida import JointRows, corrupt, denoising_loss, joint_forward
from mmpt.decode.sampling import Sampling
from mmpt.model.config import NoiseConfig
from mmpt.stream import Rows, StreamBuilder
from mmpt.vocab import MEDIA, Modality

EXACT = {"atol": 1e-10, "rtol": 0.0}


MASKED = NoiseConfig(path="masked")
TEXT = NoiseConfig(path="masked", text_block=4)


def seeded(rows, seed=0):
    return [torch.Generator().manual_seed(seed + row) for row in range(len(rows.ids))]


def only(joint, chosen):
    """The clean ids, and the noisy ones at these columns of the noisy part."""
    keep = torch.cat((torch.arange(joint.num_clean), joint.num_clean + chosen))
    columns = {f.name: getattr(joint, f.name) for f in fields(joint)} | {"num_clean": 0}
    columns = {name: c[:, keep] for name, c in columns.items() if name != "num_clean"}
    return JointRows(**columns, num_clean=joint.num_clean)


def copies_of(joint, row):
    """Of each copy in a row: its number, and the columns of its noisy ids."""
    block = joint.block[row, joint.num_clean :]
    return {int(n): (block == n).nonzero().flatten() for n in block.unique() if n >= 0}


@pytest.fixture
def joint(vocabulary, make_rows):
    rows = make_rows()
    generators = [torch.Generator().manual_seed(0)] * len(rows.ids)
    return corrupt(rows, vocabulary, generators=generators, max_noisy=80)


def test_every_block_is_a_slot_and_noisy_codes_at_the_positions_of_its_clean_copy(
    joint, vocabulary
):
    row, clean = 0, joint.num_clean
    blocks = joint.block[row].unique()
    assert len(blocks) - 1 == 2 * 5  # two documents: an image, speech, two frames, an image
    for number in blocks[1:]:
        places = (joint.block[row] == number).nonzero().flatten()
        document, position = joint.document[row, places[0]], joint.position[row, places]
        here = (joint.document[row, :clean] == document).nonzero().flatten()
        copy = here[position]  # a document's ids, in order of position
        assert torch.equal(position.diff(), torch.ones(len(places) - 1, dtype=torch.int64))
        assert joint.ids[row, places[0]] == joint.ids[row, copy[0]]
        assert torch.equal(joint.labels[row, places[:-1]], joint.ids[row, copy[1:]])
        assert joint.labels[row, places[-1]] == -1
        assert (joint.limit[row, places] == position[0]).all()
        assert (joint.modality[row, places] == joint.modality[row, copy[1]]).all()
    assert (joint.labels[:, :clean] == -1).all()


def test_about_t_of_the_codes_is_kept_and_no_dead_code_appears(vocabulary, make_document):
    rows = Rows.pack([[make_document(0)] for _ in range(400)], 60, 0)
    joint = corrupt(
        rows,
        vocabulary,
        generators=[torch.Generator().manual_seed(0)] * len(rows.ids),
        max_noisy=50,
    )
    noisy, labels = joint.ids[:, joint.num_clean + 1 :], joint.labels[:, joint.num_clean : -1]
    inside = labels >= 0
    for modality in MEDIA:
        ids = noisy[inside & (joint.modality[:, joint.num_clean : -1] == modality)]
        assert vocabulary.allowed[modality][ids.numpy()].all()
    time = joint.time[:, joint.num_clean : -1]
    assert 0.45 < float(time[inside].mean()) < 0.55
    visual = inside & (joint.modality[:, joint.num_clean : -1] < Modality.SPEECH)
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = visual & (time >= low) & (time < low + 0.25)
        kept = (noisy == labels)[chosen].float().mean()
        expected = (time + (1 - time) / 10)[chosen].mean()  # uniform noise may hit the same code
        assert abs(kept - expected) < 0.05


def test_the_budget_bounds_the_noisy_part_and_conditions_get_no_copy(vocabulary, make_rows):
    rows, generator = make_rows(), torch.Generator().manual_seed(0)
    joint = corrupt(rows, vocabulary, generators=[generator] * len(rows.ids), max_noisy=12)
    assert 4 < joint.ids.shape[1] - joint.num_clean <= 12
    rows.loss_weight[:] = 0
    assert corrupt(
        rows, vocabulary, generators=[generator] * len(rows.ids), max_noisy=12
    ).ids.shape == (2, 101)


def test_clean_ids_are_computed_as_without_noisy_copies(make_model, make_rows, joint):
    model, rows = make_model(), make_rows()
    alone = model(rows.ids, modality=rows.modality, position=rows.position, document=rows.document)
    torch.testing.assert_close(joint_forward(model, joint)[:, : joint.num_clean], alone, **EXACT)
    joint.ids[:, joint.num_clean :] = joint.ids[:, joint.num_clean :].flip(1)
    after = joint_forward(model, joint)[:, : joint.num_clean]
    torch.testing.assert_close(after, alone, **EXACT)


def test_a_block_sees_the_clean_past_but_not_its_own_clean_copy(make_model, joint):
    model = make_model()
    before = joint_forward(model, joint)
    start = int((joint.modality[0, : joint.num_clean] == Modality.SPEECH).int().argmax())
    changed = slice(start, start + 4)  # the clean speech of the first document, its second block
    joint.ids[0, changed] = joint.ids[0, changed].flip(0) - 1
    moved = (joint_forward(model, joint) - before).abs().amax(-1)[0]
    first = joint.document[0] == 0
    assert moved[first & (joint.block[0] == 0)].max() == 0
    assert moved[first & (joint.block[0] == 1)].max() == 0
    assert moved[first & (joint.block[0] == 2)].min() > 1e-6
    assert moved[~first].max() == 0


def test_the_frozen_two_step_pass_equals_the_joint_pass_and_its_gradients(
    make_model, vocabulary, joint
):
    results = []
    for frozen in (False, True):
        model = make_model()
        trained = model.freeze_for_adaptation()
        if not frozen:
            model.embedding.requires_grad_()
        hidden = joint_forward(model, joint)
        losses = denoising_loss(model, vocabulary, joint, hidden)
        sum(loss.nats for loss in losses.values()).backward()
        gradients = [p.grad for p in trained if p is not model.embedding]
        results.append([hidden, *gradients])
        assert (model.embedding.grad is None) == frozen
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_autocast_does_not_lose_gradients_between_the_two_steps(make_model, vocabulary, joint):
    gradients = []
    for enabled in (False, True):
        model = make_model("hard").float()
        trained = model.freeze_for_adaptation()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses = denoising_loss(model, vocabulary, joint, joint_forward(model, joint))
        sum(loss.nats for loss in losses.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": "3d", "head_width": 12},
        {"untied_attention": True, "gated_attention": True, "qk_norm": "full"},
    ],
)
def test_a_noisy_training_block_equals_a_cached_prefix_and_a_block_pass(
    make_model, vocabulary, make_document, changes
):
    model, document = make_model(**changes), make_document(0)
    rows = Rows.pack([[document]], 60, 0)
    joint = corrupt(
        rows,
        vocabulary,
        generators=[torch.Generator().manual_seed(0)] * len(rows.ids),
        max_noisy=60,
    )
    hidden = joint_forward(model, joint)
    for number in range(5):
        places = (joint.block[0] == number).nonzero().flatten()
        modality = Modality(int(joint.modality[0, places[0]]))
        candidates = torch.from_numpy(vocabulary.allowed[modality].nonzero()[0])
        start = int(joint.limit[0, places[0]]) + 1
        prefix = Prefix(model, vocabulary, [document.ids[:start]], None, Sampling())
        time = float(joint.time[0, places[0]])
        codes = joint.ids[:1, places[1:]]
        scores = prefix.block_scores(codes, modality, candidates, time=time)
        expected = model.logits(hidden[0, places[:-1]], candidates)
        torch.testing.assert_close(scores[0], expected, **EXACT)


def test_the_loss_is_the_cross_entropy_among_used_codes(make_model, vocabulary, joint):
    model = make_model()
    hidden = joint_forward(model, joint)
    losses = denoising_loss(model, vocabulary, joint, hidden)
    logits = model.logits(hidden)
    for modality in MEDIA:
        dead = ~torch.from_numpy(vocabulary.allowed[modality])
        log_p = logits.masked_fill(dead, -torch.inf).log_softmax(-1)
        chosen = ((joint.labels >= 0) & (joint.modality == modality)).nonzero().tolist()
        nats = -sum(log_p[b, t, joint.labels[b, t]] for b, t in chosen)
        torch.testing.assert_close(losses[modality].nats, nats)
        assert losses[modality].weight == len(chosen)


def test_scores_made_in_pieces_give_the_same_loss_and_gradients(
    make_model, vocabulary, joint, monkeypatch
):
    found = []
    for scores in (1 << 22, 12):
        monkeypatch.setattr("mmpt.decode.dida.SCORES", scores)
        model = make_model()
        losses = denoising_loss(model, vocabulary, joint, joint_forward(model, joint)).values()
        sum(loss.nats for loss in losses).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([*(loss.nats for loss in losses), *gradients])
    torch.testing.assert_close(*found, **EXACT)


def test_adaptation_lowers_the_denoising_loss_and_leaves_the_clean_pass_bit_equal(
    make_model, vocabulary, make_rows, joint
):
    model, rows = make_model(noisy=False).float(), make_rows()
    columns = {n: getattr(rows, n) for n in ("modality", "position", "document")}
    with torch.no_grad():
        before = model.logits(model(rows.ids, **columns))
    model.add_noisy_groups()
    optimiser = torch.optim.Adam(model.freeze_for_adaptation(), lr=1e-2)
    history = []
    for _ in range(8):
        losses = denoising_loss(model, vocabulary, joint, joint_forward(model, joint)).values()
        loss = sum(part.nats for part in losses) / sum(part.weight for part in losses)
        history.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.update_balance()
    assert history[-1] < 0.9 * history[0]
    with torch.no_grad():
        assert torch.equal(model.logits(model(rows.ids, **columns)), before)


def test_copies_of_a_block_lie_in_equal_parts_of_time_within_the_budget(vocabulary, make_rows):
    rows = make_rows()
    joint = corrupt(rows, vocabulary, generators=seeded(rows), max_noisy=100, copies=4)
    assert joint.ids.shape[1] - joint.num_clean <= 100
    found = []
    for row in range(len(rows.ids)):
        times = {}
        for columns in copies_of(joint, row).values():
            first = joint.num_clean + columns[0]
            place = int(joint.document[row, first]), int(joint.position[row, first])
            times.setdefault(place, []).append(float(joint.time[row, first]))
        for each in times.values():
            assert [int(t * len(each)) for t in each] == list(range(len(each)))
            found.append(len(each))
    assert max(found) == 4
    assert min(found) >= 1


@pytest.mark.parametrize("noise", [NoiseConfig(), TEXT])
def test_a_copy_among_others_is_computed_as_alone(make_model, vocabulary, make_rows, noise):
    model, rows = make_model(noisy=False), make_rows()
    model.add_noisy_groups(noise=noise)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += torch.randn(p.shape, generator=generator) * ("noisy" in name) * 0.2
    joint = corrupt(rows, vocabulary, generators=seeded(rows), max_noisy=90, copies=3, noise=noise)
    hidden = joint_forward(model, joint)
    alone = model(rows.ids, modality=rows.modality, position=rows.position, document=rows.document)
    torch.testing.assert_close(hidden[:, : joint.num_clean], alone, **EXACT)
    for columns in list(copies_of(joint, 0).values())[::3]:
        one = joint_forward(model, only(joint, columns))[0, joint.num_clean :]
        torch.testing.assert_close(one, hidden[0, joint.num_clean + columns], **EXACT)


def test_pairs_of_masked_copies_hide_every_code_once_and_only_those_count(vocabulary, make_rows):
    rows, null = make_rows(), vocabulary.structure_id("<null>")
    joint = corrupt(
        rows, vocabulary, generators=seeded(rows), max_noisy=200, copies=2, noise=MASKED
    )
    one, other = [], []
    for row in range(len(rows.ids)):
        copies = list(copies_of(joint, row).values())
        for number, columns in enumerate(copies):
            columns = joint.num_clean + columns
            hidden = joint.ids[row, columns[1:]] == null
            assert torch.equal(joint.loss_weight[row, columns[:-1]] > 0, hidden)
            clean = joint.labels[row, columns[:-1]]
            assert torch.equal(joint.ids[row, columns[1:]][~hidden], clean[~hidden])
            (other if number % 2 else one).append(hidden)
    assert torch.equal(torch.cat(one), ~torch.cat(other))


def test_text_is_cut_into_blocks_of_plain_ids_whose_slot_stands_before_them(vocabulary):
    builder = StreamBuilder(vocabulary).structure("<bod>").text(np.arange(11))
    builder.media(Modality.SPEECH, np.arange(3)).text([5]).structure("<eod>")
    rows = Rows.pack([[builder.build()]] * 30, 24, vocabulary.structure_id("<pad>"))
    noise = NoiseConfig(text_block=4)
    joint = corrupt(rows, vocabulary, generators=seeded(rows), max_noisy=60, noise=noise)
    firsts = set()
    for row in range(30):
        covered = []
        for columns in copies_of(joint, row).values():
            columns = joint.num_clean + columns
            if joint.modality[row, columns[0]] != Modality.TEXT:
                continue
            assert (joint.ids[row, columns[1:]] < vocabulary.num_text).all()
            assert 1 <= len(columns) - 1 <= 4
            covered += joint.position[row, columns[1:]].tolist()
            firsts.add(int(joint.limit[row, columns[0]]))
            assert (joint.limit[row, columns] == joint.position[row, columns[0]]).all()
        # eleven ids behind <bod>, and one behind <boa> 3 codes <eoa>
        assert covered == [*range(1, 12), 18]
    assert set(range(11)) <= firsts  # blocks begin anywhere


def test_text_that_is_masked_weighs_as_the_bound_of_the_likelihood_says(vocabulary):
    builder = StreamBuilder(vocabulary).structure("<bod>").text(np.arange(12))
    rows = Rows.pack([[builder.build()]] * 400, 13, vocabulary.structure_id("<pad>"))
    joint = corrupt(rows, vocabulary, generators=seeded(rows), max_noisy=60, noise=TEXT)
    weight, time = (x[:, joint.num_clean :] for x in (joint.loss_weight, joint.time))
    chosen = weight > 0
    expected = 1 / (1 - time[chosen])
    assert (weight[chosen] <= expected * 1.0001).all()
    rare = weight[chosen] < expected * 0.9999
    assert torch.isin(weight[chosen][rare].round(decimals=4), torch.arange(1, 5)).all()
    # every code is weighed by one, on the mean, but for what the rarest would add
    assert 0.8 < weight.sum() / (400 * 12) < 1.02


@pytest.mark.parametrize("noise", [NoiseConfig(), TEXT])
def test_the_noise_of_a_row_does_not_depend_on_the_others(vocabulary, make_document, noise):
    pad = vocabulary.structure_id("<pad>")
    documents = [[make_document(seed)] for seed in range(3)]
    options = {"max_noisy": 40, "copies": 2, "noise": noise}

    def of(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return corrupt(rows, vocabulary, generators=generators, **options)

    together = of(Rows.pack(documents, 60, pad), range(3))
    for row, document in enumerate(documents):
        single = of(Rows.pack([document], 60, pad), [row])
        for name in ("ids", "labels", "loss_weight", "time", "block", "limit"):
            ours, alone = getattr(together, name)[row], getattr(single, name)[0]
            assert torch.equal(ours[: len(alone)], alone), name
            assert (together.document[row, len(alone) :] == -1).all()


def test_codes_that_are_not_in_the_alphabet_stay_and_are_not_learned(vocabulary, make_rows):
    rows = make_rows()
    dead = vocabulary.ranges[0].start + 3
    rows.ids[rows.modality == Modality.IMAGE] = dead
    for noise in (NoiseConfig(), MASKED):
        joint = corrupt(rows, vocabulary, generators=seeded(rows), max_noisy=90, noise=noise)
        noisy = (joint.modality == Modality.IMAGE) & (joint.block >= 0)
        assert (joint.ids[noisy & (joint.limit < joint.position)] == dead).all()
        assert joint.loss_weight[noisy].sum() == 0 < joint.loss_weight.sum()


def test_text_blocks_grow_experts_and_change_no_clean_pass(make_model, vocabulary, make_rows):
    model, rows = make_model(noisy=False).float(), make_rows()
    columns = {n: getattr(rows, n) for n in ("modality", "position", "document")}
    with torch.no_grad():
        before = model.logits(model(rows.ids, **columns))
    model.add_noisy_groups()  # of media
    low_rank = [p.clone() for n, p in model.named_parameters() if "noisy_in" in n]
    model.add_noisy_groups(noise=TEXT)
    assert "noisy_text" in model.config.groups
    kept = [p for n, p in model.named_parameters() if "noisy_in" in n]
    assert all(torch.equal(a, b) for a, b in zip(low_rank, kept, strict=True))
    trained = model.freeze_for_adaptation()
    joint = corrupt(rows, vocabulary, generators=seeded(rows), max_noisy=90, noise=TEXT)
    losses = denoising_loss(model, vocabulary, joint, joint_forward(model, joint))
    assert set(losses) == {Modality.TEXT, *MEDIA}
    sum(loss.nats for loss in losses.values()).backward()
    with torch.no_grad():
        for parameter in trained:
            parameter -= 0.1 * parameter.grad
        assert torch.equal(model.logits(model(rows.ids, **columns)), before)
