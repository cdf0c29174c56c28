import pytest
import torch

from mmpt.decode.noise import make_path
from mmpt.model.config import NoiseConfig

BOOK = torch.tensor([0, 0, 0, 1, 1])  # two codebooks, of three codes and of two
VECTORS = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
PATHS = ["mixture", "masked", "metric"]
NUM = 20_000


def path_of(name, book=BOOK, vectors=VECTORS):
    return make_path(NoiseConfig(path=name), book, vectors)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginal(name, clean, time):
    """p_t (6,) of a code; the last place is the mask."""
    own = torch.eye(6, dtype=torch.float64)[clean]
    same = torch.cat((BOOK[clean] == BOOK, torch.tensor([False])))
    if name == "masked":
        return time * own + (1 - time) * torch.eye(6, dtype=torch.float64)[5]
    if name == "mixture":
        return time * own + (1 - time) * same / same.sum()
    if time == 1:
        return own
    unit = VECTORS.double() / VECTORS.double().norm(dim=1, keepdim=True)
    distance = torch.cat(((unit - unit[clean]).square().sum(1), torch.zeros(1)))
    p = same * torch.exp(-3.0 * (time / (1 - time)) ** 0.9 * distance)
    return p / p.sum()


def shares(index):
    return torch.bincount(index.flatten(), minlength=6) / index.numel()


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 0.999, 1.0])
def test_corrupted_codes_follow_the_path(name, time):
    for clean in (1, 3):
        codes = torch.full((2, NUM), clean)
        noisy = path_of(name).corrupt(codes, torch.full((2, 1), time), uniform(2, 2, NUM))
        assert noisy.shape == codes.shape
        torch.testing.assert_close(
            shares(noisy).double(), marginal(name, clean, time), atol=0.01, rtol=0.0
        )


@pytest.mark.parametrize(("name", "steps"), [("mixture", 3), ("masked", 3), ("metric", 40)])
def test_jumps_towards_a_known_code_keep_to_the_path(name, steps):
    path, clean = path_of(name), 1
    index = path.begin(torch.zeros(1, NUM, dtype=torch.int64), uniform(1, NUM))
    guess = torch.full_like(index, clean)
    times = [0.9 * step / steps for step in range(steps + 1)]
    for step in range(steps):
        noise = uniform(2, 1, NUM, seed=step + 1)
        index = path.jump(index, guess, times[step], times[step + 1], noise)
        expected = marginal(name, clean, times[step + 1])
        # Euler steps of the metric path are exact only in the limit
        atol = 0.03 if name == "metric" else 0.012
        torch.testing.assert_close(shares(index).double(), expected, atol=atol, rtol=0.0)
    last = path.jump(index, guess, times[-1], 1.0, uniform(2, 1, NUM, seed=99))
    stays = index != path.mask if name == "masked" else torch.zeros_like(index, dtype=torch.bool)
    assert torch.equal(last, torch.where(stays, index, guess))


@pytest.mark.parametrize("name", PATHS)
def test_codebooks_are_never_mixed(name):
    path = path_of(name)
    book = (torch.arange(400) % 2)[None]
    clean = torch.where(book == 0, torch.arange(400) % 3, 3 + torch.arange(400) // 2 % 2)

    def ours(index):
        known = index < 5
        return bool(((BOOK[index.clamp(max=4)] == book) | ~known).all())

    noise = path.begin(book, uniform(1, 400))
    assert ours(noise)
    for time in (0.0, 1e-6, 0.5, 0.999999, 1.0):
        assert ours(path.corrupt(clean, torch.tensor(time), uniform(2, 1, 400)))
    for now, then in ((0.0, 0.1), (0.5, 0.9), (0.999, 1.0)):
        assert ours(path.jump(noise, clean, now, then, uniform(2, 1, 400)))


def test_the_first_jump_of_the_metric_path_is_not_dead():
    path = path_of("metric")
    index, guess = torch.full((1, NUM), 0), torch.full((1, NUM), 1)
    moved = path.jump(index, guess, 0.0, 0.1, uniform(2, 1, NUM)) != index
    assert 0.02 < moved.double().mean() < 1


def test_a_large_alphabet_is_measured_in_parts(monkeypatch):
    vectors = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    book = torch.arange(60) // 20
    codes, time = torch.arange(60).repeat(5), torch.full((300,), 0.5)
    noise, target = uniform(2, 300), torch.arange(60).repeat(5) // 20 * 20
    results = []
    for chunk in (1 << 22, 700):
        monkeypatch.setattr("mmpt.decode.noise.CHUNK", chunk)
        path = path_of("metric", book, vectors)
        results.append(path.corrupt(codes, time, noise))
        results.append(path.jump(codes[None], target[None], 0.2, 0.5, noise[:, None])[0])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
