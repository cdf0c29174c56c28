import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.ar import Prefix, generate
from mmpt.decode.dida import (
    corrupt,
    denoise_block,
    denoise_passes,
    denoising_loss,
    joint_forward,
    schedule,
)
from mmpt.decode.sampling import Sampling
from mmpt.stream import Rows, StreamBuilder, parse
from mmpt.vocab import MEDIA, Modality

EXACT = {"atol": 1e-10, "rtol": 0.0}


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


@pytest.mark.parametrize(
    ("modality", "shape"),
    [(Modality.IMAGE, (2, 3)), (Modality.VIDEO, (3, 2, 2)), (Modality.SPEECH, (5,))],
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_of_denoised_blocks_equals_the_singles(
    make_model, make_prompts, vocabulary, generators, modality, shape, guidance
):
    model, prompts = make_model(), make_prompts(modality, shape)
    null = (
        StreamBuilder(vocabulary).structure("<bod>", "<null>").header(modality, shape).build().ids
    )
    options = {
        "modality": modality,
        "length": int(np.prod(shape)),
        "num_passes": 3,
        "sampling": Sampling(guidance=guidance),
    }
    seen = []
    batch = denoise_block(
        model,
        vocabulary,
        prompts,
        generators=generators(0, 1, 2),
        unconditional=[null] * 3,
        on_pass=lambda k, codes: seen.append((k, len(codes[0]))),
        **options,
    )
    for i, prompt in enumerate(prompts):
        single = denoise_block(
            model,
            vocabulary,
            [prompt],
            generators=generators(i),
            unconditional=[null],
            **options,
        )
        assert np.array_equal(single[0], batch[i])
        assert vocabulary.allowed[modality][batch[i]].all()
    frame = int(np.prod(shape[-2:]))
    num_blocks = options["length"] // frame
    assert seen == [(k + 1, frame * (k // 3 + 1)) for k in range(3 * num_blocks)]


def test_generation_goes_on_behind_a_denoised_block(
    make_model, make_prompts, vocabulary, generators
):
    model, (prompt, *_) = make_model(), make_prompts(Modality.VIDEO, (2, 2, 2))
    options = {"sampling": Sampling(), "generators": generators(0)}
    (codes,) = denoise_block(
        model, vocabulary, [prompt], modality=Modality.VIDEO, length=8, num_passes=2, **options
    )
    whole = np.concatenate([prompt, codes])
    (rest,) = generate(model, vocabulary, [whole], max_ids=5, **options)
    segments = list(parse(np.concatenate([whole, rest]), vocabulary))
    assert segments[1].codes.shape == (2, 2, 2)


def test_frames_may_be_denoised_one_call_at_a_time(
    make_model, make_prompts, vocabulary, generators
):
    model, (prompt, *_) = make_model(), make_prompts(Modality.VIDEO, (2, 2, 2))
    options = {"modality": Modality.VIDEO, "num_passes": 2, "sampling": Sampling()}
    (whole,) = denoise_block(
        model, vocabulary, [prompt], length=8, generators=generators(0), **options
    )
    one = generators(0)
    (first,) = denoise_block(model, vocabulary, [prompt], length=4, generators=one, **options)
    longer = np.concatenate([prompt, first])
    (second,) = denoise_block(model, vocabulary, [longer], length=4, generators=one, **options)
    assert np.array_equal(np.concatenate([first, second]), whole)


def test_what_cannot_be_denoised_is_refused(make_model, make_prompts, vocabulary, generators):
    prompts = make_prompts(Modality.VIDEO, (2, 2, 2))
    options = {
        "modality": Modality.VIDEO,
        "sampling": Sampling(),
        "generators": generators(0, 1, 2),
    }
    with pytest.raises(UserError, match="whole number of blocks"):
        denoise_block(make_model(), vocabulary, prompts, length=6, num_passes=2, **options)
    with pytest.raises(UserError, match="at least 1 pass"):
        denoise_block(make_model(), vocabulary, prompts, length=4, num_passes=0, **options)
    with pytest.raises(UserError, match="no noisy group"):
        denoise_block(
            make_model(noisy=False), vocabulary, prompts, length=4, num_passes=1, **options
        )


def test_the_schedule_goes_from_noise_to_clean():
    assert schedule(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    shifted = schedule(4, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert shifted[2] == pytest.approx(0.25)


class _Exact:
    """Stands for a model that knows the true conditionals of three codes of three values."""

    def __init__(self, joint: torch.Tensor, num_samples: int) -> None:
        self.joint, self.shape = joint, (num_samples, 3)

    def posterior(self, codes: torch.Tensor, time: float) -> torch.Tensor:
        # p(clean code i | noisy codes): each noisy code is the clean one with t, else uniform
        noise = time * torch.eye(3, dtype=torch.float64) + (1 - time) / 3
        likelihood = [noise[:, codes[:, i]].T for i in range(3)]  # (samples, clean value)
        weight = torch.einsum("abc,na,nb,nc->nabc", self.joint, *likelihood)
        marginals = [weight.sum(dim=[d for d in (1, 2, 3) if d != i + 1]) for i in range(3)]
        p = torch.stack(marginals, 1)
        return (p / p.sum(-1, keepdim=True)).log()


def test_many_passes_with_true_conditionals_draw_from_the_true_joint(
    monkeypatch, make_model, make_prompts, vocabulary
):
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 4
    joint /= joint.sum()
    num_samples, num_passes = 4000, 40
    exact, times = _Exact(joint, num_samples), iter(schedule(num_passes))

    class Known:
        device = torch.device("cpu")

        def __init__(self, *args) -> None:
            pass

        def block_scores(self, codes, modality, candidates, *, time):
            index = (codes[..., None] == candidates).int().argmax(-1)
            return exact.posterior(index, next(times))

    monkeypatch.setattr("mmpt.decode.dida.Prefix", Known)
    monkeypatch.setattr("mmpt.decode.dida._block_size", lambda *args: 3)
    three = vocabulary.__class__.build(
        num_text=1, text_fingerprint="t", codebooks=[("s", 3, {"speech": "s"}, None)]
    )
    seeds = [torch.Generator().manual_seed(i) for i in range(num_samples)]
    *_, last = denoise_passes(
        make_model(),
        three,
        [np.zeros(1)] * num_samples,
        modality=Modality.SPEECH,
        length=3,
        num_passes=num_passes,
        sampling=Sampling(),
        generators=seeds,
    )
    codes = np.stack(last.codes) - three.range_of(Modality.SPEECH).start
    count = np.bincount(codes @ [9, 3, 1], minlength=27)
    expected = joint.flatten().numpy() * num_samples
    common = expected > 5
    chi_square = ((count - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < 2.2 * common.sum()  # of 4,000 draws; factorised draws miss by far more
    marginals = [joint.sum(dim=[d for d in range(3) if d != i]) for i in range(3)]
    independent = torch.einsum("a,b,c->abc", *marginals).flatten().numpy() * num_samples
    assert ((independent - expected)[common] ** 2 / expected[common]).sum() > 10 * common.sum()
