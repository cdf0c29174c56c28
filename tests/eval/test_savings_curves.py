"""eta: planted savings are found, bounds are said to be bounds, equal runs save nothing."""

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.eval.savings_curves import ALL, Comparison, LossCurve, combine, cost_to_reach
from mmpt.eval.savings_page import render_savings
from mmpt.eval.savings_variants import parse_variants, variant_model
from mmpt.model.config import ModelConfig

FLOOR, ALPHA, STEP = 1.5, 0.3, 1e9  # of the planted law; FLOPs of a step


def law(flops):
    return FLOOR + 4 * (flops / STEP) ** -ALPHA


def make_curve(steps, eta=1.0, noise=0.0, seed=0, slower=1.0):
    """A run of a model that does with C what the dense one does with eta x C."""
    steps = np.unique(np.geomspace(10, steps, 40).round())
    rng, flops = np.random.default_rng([seed, int(100 * eta)]), steps * STEP
    text, image = (law(eta * flops) * np.exp(noise * rng.standard_normal(40)) for _ in "ab")
    nats = {"text": text, "image": 2 * image, ALL: (text + 2 * image) / 2}
    return LossCurve(f"{eta}-{seed}", steps, {"flops": flops, "seconds": slower * steps}, nats)


def make_comparison(etas, noise=0.0):
    runs = {"dense": [make_curve(2000, noise=noise, seed=seed) for seed in range(3)]}
    for name, eta in etas.items():
        runs[name] = [make_curve(1000, eta, noise, seed, slower=1.25) for seed in range(3)]
    return Comparison(runs)


def test_planted_savings_are_found_exactly_where_there_is_no_noise():
    compared = make_comparison({"better": 1.5, "worse": 0.7})
    for name, eta in (("better", 1.5), ("worse", 0.7)):
        for medium in compared.media:
            found = compared.saving(name, medium, "flops")
            assert found.value == pytest.approx(eta, rel=1e-3)  # linear between evaluations
            assert found.low <= found.value <= found.high
            assert compared.saving(name, medium, "seconds").value == pytest.approx(eta / 1.25, 1e-3)
        assert compared.relative_cost(name, "seconds") == pytest.approx(1.25)
        assert compared.relative_cost(name, "flops") == pytest.approx(1.0)


def test_intervals_cover_planted_savings_most_of_the_time():
    hits, values = 0, []
    for batch in range(20):
        dense = [make_curve(2000, 1.0, 0.004, 10 * batch + n) for n in range(3)]
        ours = [make_curve(1000, 1.4, 0.004, 10 * batch + n) for n in range(3)]
        found = Comparison({"dense": dense, "moe": ours}).saving("moe", "text", "flops")
        hits += found.low <= 1.4 <= found.high
        values.append(found.value)
    assert hits >= 17
    assert np.exp(np.log(values).mean()) == pytest.approx(1.4, rel=0.03)  # no bias


def test_equal_runs_save_nothing():
    compared = make_comparison({"same": 1.0})
    for cost, eta in (("flops", 1.0), ("seconds", 0.8)):
        for medium in compared.media:
            assert compared.saving("same", medium, cost).value == pytest.approx(eta, rel=1e-3)
    for place in range(40):
        saving = compared.saving("same", ALL, "flops", place)
        assert saving.value == pytest.approx(1.0, rel=1e-3)
        assert not saving.bound


def test_what_the_dense_run_does_not_reach_is_above_and_never_extrapolated():
    compared = make_comparison({"much": 3.0, "little": 0.001})
    much, little = (compared.saving(name, ALL, "flops") for name in ("much", "little"))
    assert (much.bound, little.bound) == ("above", "below")
    assert much.value == pytest.approx(2.0)  # the dense runs are twice as long
    assert little.value == pytest.approx(0.01)  # they begin at a hundredth
    assert np.isnan([much.low, much.high, little.low, little.high]).all()
    assert much.to_json() == {"eta": 2.0, "low": None, "high": None, "bound": "above"}
    mixed = combine(np.array([2.0, 1.5]), ["above", ""])
    assert mixed.bound == "above"
    assert 1.5 < mixed.value < 2.0
    assert combine(np.array([2.0, 0.01]), ["above", "below"]).to_json()["eta"] is None
    assert np.isnan(combine(np.array([1.5]), [""]).high)  # of one seed


def test_a_curve_that_does_not_always_fall_is_read_once():
    costs, nats = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([4.0, 2.0, 3.0, 1.0])
    assert cost_to_reach(costs, nats, 3.0) == (pytest.approx(10 ** (1 / 1.5)), "")
    assert cost_to_reach(costs, nats, 2.5) == (pytest.approx(10.0), "")  # where it is level
    assert cost_to_reach(costs, nats, 1.0) == (pytest.approx(1000.0), "")
    assert cost_to_reach(costs, nats, 4.0) == (1.0, "")
    assert cost_to_reach(costs, nats, 4.1) == (1.0, "below")
    assert cost_to_reach(costs, nats, 0.9) == (1000.0, "above")


def test_the_page_says_what_is_known(read_page):
    compared = make_comparison({"4t2v2s": 1.5, "much": 3.0, "<b>": 0.9}, noise=0.003)
    page = read_page(render_savings(compared, {"environment": {"cores": 2}}, "mmpt savings x"))
    assert page.asks_nothing()
    assert "much saves most" in page.text
    assert "above 2.00" in page.text
    assert "mmpt savings x" in page.text
    assert "<b>" in page.text
    worse = render_savings(make_comparison({"much": 0.5, "less": 0.8}, noise=0.003), {}, "")
    assert "less comes nearest, and none saves" in read_page(worse).text
    assert len(page.all("svg")) == 2 * 3  # two charts of three kinds of losses
    alone = read_page(render_savings(Comparison({"dense": compared.curves["dense"]}), {}, ""))
    assert "no variant is done yet" in alone.text


def test_variants_are_changes_of_the_model_by_name():
    base = ModelConfig(vocab_size=10, width=24, num_heads=2)
    added = parse_variants(
        ["wide:like=4t2v2s,expert_hidden=96,groups.text.num_experts=3", "deep:num_layers=7"]
    )
    wide = variant_model("wide", base, added)
    assert (wide.expert_hidden, wide.groups["text"].num_experts) == (96, 3)
    assert wide.groups["visual"] == variant_model("4t2v2s", base).groups["visual"]
    assert variant_model("deep", base, added).groups == base.groups
    shapes = {}
    for name in ("dense", "shared-8", "1t1v1s", "4t2v2s"):
        model = variant_model(name, base)
        shapes[name] = [group.num_experts for group in model.groups.values()]
        assert all(group.num_active == 1 for group in model.groups.values())
    assert shapes == {"dense": [1], "shared-8": [8], "1t1v1s": [1, 1, 1], "4t2v2s": [4, 2, 2]}
    for changes, words in (
        ({"x": ("like=y",)}, "x.* is like 'y'; the variants are dense"),
        ({"x": ("like=z",), "z": ("like=x",)}, "is like"),
        ({"x": ("gates=true",)}, "variant x: unknown key 'gates'"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            variant_model("x", base, changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not NAME:key=value"):
        parse_variants(["width=3"])
