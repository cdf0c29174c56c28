"""Samplers with true conditionals of three codes of three values: which draw from their joint.

The model is a function here: posteriors of a known joint distribution, given noisy codes and time.
"""

from collections.abc import Iterator

import pytest
import torch

from mmpt.decode.noise import Masked, Mixture, NoisePath, make_path
from mmpt.decode.passes import Denoising, refine
from mmpt.decode.samplers import SAMPLERS
from mmpt.decode.sampling import Sampling
from mmpt.model.config import NoiseConfig

NUM_SAMPLES = 20_000
FREEDOM = 26
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
        ("mixture", Denoising(sampler="euler", num_passes=200)),
        ("masked", Denoising(sampler="euler", num_passes=200)),
        ("mixture", Denoising(sampler="tau", num_passes=200)),
        ("mixture", Denoising(sampler="tau", num_passes=100, corrections=1)),
        ("masked", Denoising(sampler="remask", num_passes=300, remask=0.01)),
        ("masked", Denoising(sampler="threshold", num_passes=3, threshold=1)),
        ("masked", Denoising(sampler="entropy", num_passes=3, entropy_bound=0)),
        ("masked", Denoising(sampler="raster", num_passes=3)),
        ("masked", Denoising(sampler="diagonal", num_passes=3)),
    ],
    ids=str,
)
def test_consistent_samplers_draw_from_the_joint(joint, path, denoising):
    chi = chi_square(joint, sample(joint, denoising, path_of(path))[-1])
    print(denoising.sampler, path, chi)
    assert chi < ALARM


@pytest.mark.parametrize("sampler", ["euler", "tau"])
def test_the_metric_path(joint, sampler):
    for n in (5, 25, 100, 400):
        print(
            sampler,
            n,
            chi_square(
                joint,
                sample(joint, Denoising(sampler=sampler, num_passes=n), path_of("metric"))[-1],
            ),
        )
