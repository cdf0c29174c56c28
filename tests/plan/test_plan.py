"""`mmpt plan`: Step Law's numbers, and a coordinate check that can fail."""

import json
from dataclasses import replace

import pytest

from mmpt.__main__ import main
from mmpt.model.config import ModelConfig
from mmpt.plan.mup import check_coordinates, slope, widened
from mmpt.plan.steplaw import best_batch, best_rate
from mmpt.train.optim import OptimConfig

RECIPE = "examples/recipes/tiny.toml"
SMALL = ModelConfig(
    vocab_size=1, width=32, num_layers=1, num_heads=4, num_kv_heads=2, expert_hidden=64
)


def test_step_law_gives_the_numbers_of_the_paper():
    assert best_rate(100_000_000, 2_000_000_000) == pytest.approx(2.5e-3, rel=0.02)
    assert best_batch(2_000_000_000) == pytest.approx(119_000, rel=0.01)


def test_suggestions_stand_beside_what_the_recipe_has(capsys):
    assert main(["plan", RECIPE, "--suggest", "--json", "steps=2000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2000 * 6 * 512
    assert found["recipe"] == {"lr": 3e-3, "batch_tokens": 3072, "steps": 2000}
    parameters = found["active parameters without embedding and head"]
    # q, k, v and out; one expert; the router of two; norms
    layer = 144 * 240 + 144 * 144 + 3 * 144 * 320 + 2 * 144 + 2 * 144 + 2 * 24
    assert parameters == 4 * layer + 144
    assert found["step law"]["lr"] == pytest.approx(best_rate(parameters, 6_144_000), rel=0.05)


def test_a_slope_is_the_exponent_of_the_width():
    assert slope([2, 4, 8], [3.0, 3.0, 3.0]) == 0.0
    assert slope([2, 4, 8], [1.0, 2.0, 4.0]) == pytest.approx(1.0)


def test_wider_models_have_more_heads_of_one_width():
    models = widened(replace(SMALL, width=512, num_layers=30))
    assert {model.width_per_head for model in models} == {32}  # narrowed from 128
    assert {model.num_layers for model in models} == {2}
    assert {model.expert_hidden / model.width for model in models} == {64 / 512}
    assert {model.num_heads / model.num_kv_heads for model in models} == {2}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_coordinate_check_passes_with_mup_and_fails_without(kind, tied):
    config, optim = replace(SMALL, tie_embeddings=tied), OptimConfig(kind=kind)
    standard = check_coordinates(config, optim)
    assert not standard["passed"]
    assert max(standard["slopes after the last step"].values()) > 0.25
    mup = check_coordinates(config, replace(optim, mup_base_width=32))
    assert mup["passed"]
