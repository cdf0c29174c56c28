import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.ar import generate
from mmpt.decode.denoise import denoise_block, denoise_passes
from mmpt.decode.sampling import Sampling
from mmpt.stream import StreamBuilder, parse
from mmpt.vocab import Modality


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

    monkeypatch.setattr("mmpt.decode.denoise.Prefix", Known)
    monkeypatch.setattr("mmpt.decode.denoise._block_size", lambda *args: 3)
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
