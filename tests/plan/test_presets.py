"""The shipped recipes of models: their sizes, and that each is one that can be trained."""

from pathlib import Path

import pytest

from mmpt.plan import plan

RECIPES = Path("examples/recipes")


@pytest.mark.parametrize(
    ("name", "vocabulary", "billions"),
    [
        ("moma-1t1i", 65_536, 2.3),  # arXiv 2407.21770
        ("emu3.5", 282_926, 34.1),  # arXiv 2510.26583
    ],
)
def test_sizes_are_those_of_the_papers(name, vocabulary, billions):
    found = plan(RECIPES / f"{name}.toml", [f"model.vocab_size={vocabulary}"])
    assert found["model"]["parameters"] / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    ("name", "gpus", "device"),
    [("4t2v2s", 64, "h100"), ("moma-1t1i", 256, "h100"), ("emu3.5", 1024, "h200")],
)
def test_a_recipe_fits_as_its_first_lines_say(name, gpus, device):
    path = RECIPES / f"{name}.toml"
    assert f"{name}.toml model.vocab_size=" in path.read_text()
    found = plan(path, ["model.vocab_size=65536"], gpus=gpus, device=device)
    assert found["own"]["fits"]
