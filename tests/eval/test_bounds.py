"""Evidence bounds of noise paths, beside sums over all states of distributions small enough."""

import itertools
import math

import numpy as np
import pytest
import torch

from mmpt.decode.noise import Masked, Mixture, NoisePath
from mmpt.eval.bounds import LEVELS, SHARES, bound_copies, level_copies, mixture_nats, rate_nats

V, N = 3, 2
STATES = torch.tensor(list(itertools.product(range(V), repeat=N)))
PRIOR = torch.tensor([0.3, 0.02, 0.05, 0.1, 0.18, 0.05, 0.01, 0.04, 0.25], dtype=torch.float64)
SHARED = SHARES.index(1.0)


@pytest.fixture(params=[Mixture, Masked])
def path(request) -> NoisePath:
    return request.param(torch.zeros(V, dtype=torch.int64))


def likelihood(noisy: torch.Tensor, time: float) -> torch.Tensor:
    """(9, N): how likely each noisy code is, for each state as the clean one."""
    same = (noisy == STATES).double()
    return torch.where(noisy == V, 1.0, time * same + (noisy < V) * (1 - time) / V)


def posterior(noisy: torch.Tensor, time: float) -> torch.Tensor:
    """log p (N, V) of the clean codes, by the whole joint distribution."""
    shown = torch.where(noisy == V, 1.0, (noisy == STATES).double())
    weight = PRIOR * (shown if (noisy == V).any() else likelihood(noisy, time)).prod(1)
    p = [[weight[STATES[:, n] == code].sum() for code in range(V)] for n in range(N)]
    return (torch.tensor(p) / weight.sum()).log()


def quadrature(num: int, last: float) -> list[tuple[float, float]]:
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return list(zip((nodes + 1) / 2 * last, weights / 2 * last, strict=True))


def nats_of(copy, clean: torch.Tensor) -> float:
    """What a copy adds to the bound, predicted by the posterior."""
    log_p, time = posterior(copy.noisy, copy.time), torch.full((N,), copy.time).double()
    nats = -log_p.gather(1, clean[:, None])[:, 0]
    if copy.kind != "plain":
        rates = torch.full((N,), copy.kind == "rates")
        inside = torch.ones(N, V, dtype=torch.bool)
        nats = mixture_nats(log_p, clean, copy.noisy, time, inside, rates=rates)[:, SHARED]
    return float((torch.where(copy.weight > 0, nats, 0.0) * copy.weight).sum())


def test_rates_diverge_by_the_published_formula():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(40, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    clean, noisy = torch.randint(5, (2, 40), generator=generator)
    time = torch.rand(40, generator=generator, dtype=torch.float64)
    ours = rate_nats(log_p, clean, noisy, time, torch.ones(40, 5, dtype=torch.bool))
    for n in range(40):
        t, z = float(time[n]), int(noisy[n])
        others = log_p[n].exp()  # what is known without the noisy code, which UDLM's y is of
        others[z] *= (1 - t) / (1 - t + 5 * t)
        others /= others.sum()
        y_hat, y = 5 * t * others + 1 - t, torch.full((5,), 1 - t, dtype=torch.float64)
        y[clean[n]] += 5 * t
        inner = 5 / y[z] - 5 / y_hat[z]
        inner -= (y / y[z] * (y_hat[z] * y / (y_hat * y[z])).log()).sum()
        assert float(ours[n]) == pytest.approx(-float(inner) / (5 * t), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("state", [0, 6])
def test_the_mixture_bound_of_exact_posteriors_is_the_likelihood(state):
    clean, inside, last = STATES[state], torch.ones(N, V, dtype=torch.bool), 1 - 1e-5
    total = 0.0
    for time, weight in quadrature(32, last):
        at = torch.full((N,), time, dtype=torch.float64)
        for noisy in STATES:
            chance = likelihood(noisy, time)[state].prod()
            nats = rate_nats(posterior(noisy, time), clean, noisy, at, inside).sum()
            total += weight * float(chance * nats)
    for noisy in STATES:  # what remains
        nats = -posterior(noisy, last).gather(1, clean[:, None]).sum()
        total += float(likelihood(noisy, last)[state].prod() * nats)
    assert total == pytest.approx(-math.log(PRIOR[state]), abs=1e-3)


@pytest.mark.parametrize("state", [0, 6])
def test_copies_sum_up_to_the_bound_on_average(path, state, monkeypatch):
    monkeypatch.setattr("mmpt.eval.bounds.last_time", lambda num: 0.999)  # there it is exact
    clean, generator = STATES[state], torch.Generator().manual_seed(1)
    sums = np.array(
        [
            sum(nats_of(copy, clean) for copy in bound_copies(path, clean, generator, draws=8))
            for _ in range(60)
        ]
    )
    error = sums.std() / len(sums) ** 0.5
    assert abs(sums.mean() + math.log(PRIOR[state])) < 4 * error + 0.01
    assert error < 0.3


def test_the_bound_of_a_constant_prediction_is_its_cross_entropy():
    y, ones = torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64), torch.ones(1, V).bool()
    log_y = y.log()[None]
    for clean in range(V):
        label, total, last = torch.tensor([clean]), 0.0, 1 - 1e-4
        for time, weight in [*quadrature(24, last), (last, 1.0)]:
            for noisy in range(V):
                at = torch.tensor([time], dtype=torch.float64)
                rates = torch.tensor([weight != 1.0])
                nats = mixture_nats(log_y, label, torch.tensor([noisy]), at, ones, rates=rates)
                chance = (1 - time) / V + time * (noisy == clean)
                total += weight * chance * float(nats[0, SHARES.index(0.0)])
        assert total == pytest.approx(-math.log(y[clean]), abs=1e-3)
        masked = Masked(torch.zeros(V, dtype=torch.int64))
        generator = torch.Generator().manual_seed(0)
        copies = bound_copies(masked, label, generator, draws=3)
        assert sum(float(copy.weight * -log_y[0, clean]) for copy in copies) == pytest.approx(
            -math.log(y[clean])
        )


def test_every_number_of_masked_codes_is_drawn_alike():
    clean, masked = torch.zeros(8, dtype=torch.int64), Masked(torch.zeros(V, dtype=torch.int64))
    copies = bound_copies(masked, clean, torch.Generator().manual_seed(0), draws=16)
    numbers = [int((copy.noisy == masked.mask).sum()) for copy in copies]
    assert sorted(numbers) == sorted([*range(1, 9)] * 2)
    for copy, number in zip(copies, numbers, strict=True):
        assert copy.time == 1 - number / 8
        assert torch.equal(copy.weight > 0, copy.noisy == masked.mask)
        assert float(copy.weight.sum()) == pytest.approx(8 / 16)


def test_levels_count_all_codes_or_the_masked_ones(path):
    clean = torch.zeros(1000, dtype=torch.int64)
    copies = level_copies(path, clean, torch.Generator().manual_seed(0))
    assert [copy.time for copy in copies] == list(LEVELS)
    for copy in copies:
        if isinstance(path, Masked):
            assert torch.equal(copy.weight, (copy.noisy == path.mask).double())
        else:
            assert (copy.weight == 1).all()
        kept = float((copy.noisy == clean).double().mean())
        by_chance = 0 if isinstance(path, Masked) else (1 - copy.time) / V
        assert kept == pytest.approx(copy.time + by_chance, abs=0.06)
