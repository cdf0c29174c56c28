"""Non-inferiority on numbers with known answers: size, power, and what few prompts can say."""

import numpy as np
import pytest
from scipy import stats

from mmpt.eval.gate_stats import (
    FEWEST,
    Entropy,
    KernelDistance,
    Margin,
    Ratio,
    expanded_tail,
    noninferiority,
    value,
)

MARGIN = Margin(size=0.02, relative=True)


def _verdicts(loss: float, *, num: int = 60, trials: int = 150) -> list[str]:
    # a prompt's difficulty is shared, so that only pairing can see losses this small
    found = []
    for seed in range(trials):
        rng = np.random.default_rng(seed)
        hard = rng.normal(4.0, 0.5, num)
        ones = np.ones(num)
        reference = Ratio(hard + rng.normal(0, 0.1, num), ones)
        candidate = Ratio((1 + loss) * hard + rng.normal(0, 0.1, num), ones)
        found.append(noninferiority(reference, candidate, MARGIN, seed=seed).verdict)
    return found


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmpt.eval.gate_stats.NUM_DRAWS", 400)


def test_an_equal_system_is_not_inferior():
    assert _verdicts(0.0).count("not inferior") >= 0.95 * 150


def test_an_inferior_system_is_called_so():
    assert _verdicts(0.04).count("inferior") >= 0.95 * 150


@pytest.mark.parametrize("num", [FEWEST, 60])
def test_at_the_margin_either_verdict_is_as_rare_as_the_level_says(num: int):
    found = _verdicts(0.02, num=num)
    # 5% of 150 are 7.5; more than 15 come of a correct test once in two hundred times
    assert found.count("not inferior") <= 15
    assert found.count("inferior") <= 15
    assert found.count("cannot tell") >= 120


def test_few_prompts_cannot_tell_even_of_equal_numbers():
    few = Ratio(np.full(FEWEST - 1, 4.0), np.ones(FEWEST - 1))
    outcome = noninferiority(few, few, MARGIN)
    assert (outcome.verdict, outcome.low, outcome.high) == ("cannot tell", None, None)
    enough = Ratio(np.full(FEWEST, 4.0), np.ones(FEWEST))
    assert noninferiority(enough, enough, MARGIN).verdict == "not inferior"


def test_prompts_that_count_nothing_do_not_help_to_reach_the_fewest():
    below = np.r_[np.ones(FEWEST - 1), np.zeros(100)]
    outcome = noninferiority(Ratio(below, below), Ratio(below, below), MARGIN)
    assert (outcome.verdict, outcome.num_prompts) == ("cannot tell", FEWEST - 1)


def test_where_more_is_better_less_is_the_loss():
    ones = np.ones(40)
    better, worse = Ratio(0.9 * ones, ones), Ratio(0.5 * ones, ones)
    points = Margin(size=0.02, higher_is_better=True)
    assert noninferiority(better, worse, points).verdict == "inferior"
    outcome = noninferiority(worse, better, points)
    assert outcome.verdict == "not inferior"
    assert outcome.loss == pytest.approx(-0.4)


def test_the_tail_is_that_of_student():
    for num in (FEWEST, 50, 1000):
        wanted = stats.norm.cdf(stats.t.ppf(0.05, num - 1) * (num / (num - 1)) ** 0.5)
        assert expanded_tail(num) == pytest.approx(wanted, abs=2e-4)


def test_entropy_is_of_all_codes_together():
    counts = np.array([[4, 0, 0], [0, 4, 0]])
    assert value(Entropy(counts)) == pytest.approx(np.log(2))
    assert Entropy(counts).redraw(np.array([[2, 0]])) == pytest.approx(0)


def _kernel_distance(rng: np.random.Generator, shift: float) -> KernelDistance:
    x, y = rng.normal(0, 1, (50, 3)) + shift, rng.normal(0, 1, (50, 3))
    return KernelDistance(*[(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))])


def test_the_kernel_distance_has_no_bias():
    rng = np.random.default_rng(0)
    same = np.array([value(_kernel_distance(rng, 0.0)) for _ in range(100)])
    assert abs(same.mean()) < 3 * same.std() / 10
    far = _kernel_distance(rng, 1.0)
    assert value(far) > 0.5
    # a draw holds copies of a prompt, which are not compared with each other
    drawn = far.redraw(rng.multinomial(50, [0.02] * 50, size=500))
    assert drawn.mean() == pytest.approx(value(far), rel=0.05)
