"""Samplers with true conditionals of three codes of three values: which draw from their joint.

The model is a function here: posteriors of a known joint distribution, given noisy codes and time.
"""

from collections.abc import Iterator

import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.noise import Masked, Mixture, NoisePath, make_path
from mmpt.decode.passes import Denoising, refine
from mmpt.decode.samplers import SAMPLERS
from mmpt.decode.sampling import Sampling
from mmpt.model.config import NoiseConfig

NUM_SAMPLES = 4000
ALARM = 60.0  # chi-square of 26 degrees is above it once in 6,000 times
VECTORS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.8, 0.6]])


@pytest.fixture(scope="module")
def joint() -> torch.Tensor:
    """float64 (3, 3, 3): codes that depend on each other, all of which occur."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 3 + 0.02
    return joint / joint.sum()


def path_of(name: str) -> NoisePath:
    return make_path(NoiseConfig(path=name), torch.zeros(3, dtype=torch.int64), VECTORS)


def likelihood(path: NoisePath, time: float) -> torch.Tensor:
    """(3 clean values, 4 noisy ones, of which the last is masked)."""
    eye = torch.eye(3, dtype=torch.float64)
    gone = torch.zeros(3, 1, dtype=torch.float64)
    if isinstance(path, Masked):
        return torch.cat((time * eye, gone + 1 - time), 1)
    if isinstance(path, Mixture):
        return torch.cat((time * eye + (1 - time) / 3, gone), 1)
    distance = (VECTORS[:, None] - VECTORS).square().sum(-1).double()
    return torch.cat(((-3.0 * (time / (1 - time)) ** 0.9 * distance).softmax(-1), gone), 1)


def posterior(joint: torch.Tensor, codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, 3, 3) of each clean code, given all noisy ones."""
    a, b, c = (table[:, codes[:, i]] for i in range(3))
    weight = torch.einsum("abc,an,bn,cn->nabc", joint, a, b, c)
    marginals = [weight.sum(dim=[d for d in (1, 2, 3) if d != i + 1]) for i in range(3)]
    p = torch.stack(marginals, 1)
    return (p / p.sum(-1, keepdim=True)).log()


def sample(
    joint: torch.Tensor,
    denoising: Denoising,
    path: NoisePath,
    *,
    free: torch.Tensor | None = None,
    sampling: Sampling | None = None,
) -> list[torch.Tensor]:
    """Codes (NUM_SAMPLES, 3) behind each pass."""
    generator = torch.Generator().manual_seed(1)

    def look(
        index: torch.Tensor, time: torch.Tensor, live: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        # a masked path's posterior is the same at all times, but for 0
        now = 0.5 if isinstance(path, Masked) else float(time[0])
        scores = posterior(joint, index, likelihood(path, now))
        yield slice(0, 2), scores[:, :2]
        yield slice(2, 3), scores[:, 2:]

    def draws(count: int, live: torch.Tensor) -> torch.Tensor:
        return torch.rand(count, NUM_SAMPLES, 3, generator=generator, dtype=torch.float64)

    free = torch.ones(NUM_SAMPLES, 3, dtype=torch.bool) if free is None else free
    passes = refine(
        SAMPLERS[denoising.sampler](denoising, path),
        sampling or Sampling(),
        book=torch.zeros(3, dtype=torch.int64),
        free=free,
        width=torch.full((NUM_SAMPLES,), 3),
        look=look,
        draws=draws,
    )
    return [passed.index for passed in passes]


def chi_square(joint: torch.Tensor, codes: torch.Tensor) -> float:
    """Of samples (n, 3), against n draws from the joint."""
    count = torch.bincount(codes @ torch.tensor([9, 3, 1]), minlength=27)
    expected = joint.flatten() * len(codes)
    return float(((count - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("path", "denoising"),
    [
        ("mixture", Denoising(sampler="euler", num_passes=60)),
        ("masked", Denoising(sampler="euler", num_passes=60)),
        ("mixture", Denoising(sampler="tau", num_passes=60)),
        ("metric", Denoising(sampler="euler", num_passes=60)),
        ("metric", Denoising(sampler="tau", num_passes=60)),
        ("mixture", Denoising(sampler="tau", num_passes=30, corrections=1)),
        ("masked", Denoising(sampler="remask", num_passes=80, remask=0.03)),
        ("masked", Denoising(sampler="threshold", num_passes=3, threshold=1)),
        ("masked", Denoising(sampler="entropy", num_passes=3, entropy_bound=0)),
        ("masked", Denoising(sampler="raster", num_passes=3)),
        ("masked", Denoising(sampler="diagonal", num_passes=3)),
    ],
    ids=lambda x: x if isinstance(x, str) else x.sampler,
)
def test_consistent_samplers_draw_from_the_joint(joint, path, denoising):
    assert chi_square(joint, sample(joint, denoising, path_of(path))[-1]) < ALARM


@pytest.mark.parametrize(
    ("path", "sampler"),
    [("mixture", "euler"), ("mixture", "tau"), ("metric", "tau"), ("masked", "euler")],
)
def test_a_single_pass_draws_each_code_alone(joint, path, sampler):
    one = chi_square(
        joint, sample(joint, Denoising(sampler=sampler, num_passes=1), path_of(path))[-1]
    )
    assert one > 3 * ALARM


@pytest.mark.parametrize(
    "denoising",
    [
        Denoising(sampler="maskgit", num_passes=3, schedule="linear", confidence_temperature=0),
        Denoising(sampler="entropy", num_passes=3, entropy_bound=9),
        Denoising(sampler="threshold", num_passes=3, threshold=0.5),
    ],
    ids=lambda x: x.sampler,
)
def test_confidence_that_writes_too_soon_or_looks_at_values_is_biased(joint, denoising):
    assert chi_square(joint, sample(joint, denoising, path_of("masked"))[-1]) > 1.5 * ALARM


@pytest.mark.parametrize("path", ["mixture", "masked", "metric"])
def test_every_pass_can_change_codes(joint, path):
    noise = torch.rand(
        NUM_SAMPLES, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    before = path_of(path).begin(torch.zeros(NUM_SAMPLES, 3, dtype=torch.int64), noise)
    for codes in sample(joint, Denoising(num_passes=3), path_of(path)):
        assert (codes != before).float().mean() > 0.01
        before = codes


@pytest.mark.parametrize("name", ["maskgit", "entropy", "threshold", "raster"])
def test_samplers_by_order_write_all_free_codes_in_time(joint, name):
    free = torch.rand(NUM_SAMPLES, 3, generator=torch.Generator().manual_seed(3)) < 0.7
    denoising = Denoising(sampler=name, num_passes=3)
    passes = sample(joint, denoising, path_of("masked"), free=free)
    assert len(passes) <= 3
    assert (passes[-1][free] < 3).all()


def test_times_go_from_noise_to_clean():
    assert Denoising(num_passes=4).times == [0, 0.25, 0.5, 0.75, 1]
    assert Denoising(num_passes=4, shift=3.0).times == pytest.approx([0, 0.1, 0.25, 0.5, 1])
    cosine = Denoising(num_passes=2, sampler="maskgit").times
    assert cosine == pytest.approx([0, 1 - 0.5**0.5, 1])


def test_guidance_follows_its_schedule():
    time = torch.tensor([0.0, 0.5, 0.9])
    inside = Denoising(guidance_interval=(0.2, 0.8)).guidance_at(time, 3.0)
    assert inside.tolist() == [1.0, 3.0, 1.0]
    ramp = Denoising(guidance_ramp=True).guidance_at(time, 3.0)
    assert ramp.tolist() == pytest.approx([1.0, 2.0, 2.8])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_passes": 0}, "at least 1 pass"),
        ({"shift": 0}, "more than 0"),
        ({"threshold": 2}, "0 to 1"),
        ({"corrections": 1}, "of sampler tau"),
        ({"guidance_interval": (0.5, 0.2)}, "two times"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Denoising(**settings)


@pytest.mark.parametrize(("name", "path"), [("maskgit", "mixture"), ("tau", "masked")])
def test_a_sampler_needs_its_noise_path(name, path):
    with pytest.raises(UserError, match="needs a model of noise path"):
        SAMPLERS[name](Denoising(sampler=name), path_of(path))
