"""A model leaves a run as one folder, and comes back as a start."""

from dataclasses import replace

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.train.export import export
from mmpt.train.pretrain import pretrainer, train


@pytest.fixture
def run(tmp_path, recipe, vocabulary):
    train(recipe, tmp_path / "run", vocabulary=vocabulary, progress=False)
    return tmp_path / "run"


def test_an_exported_model_is_that_of_the_run_and_can_be_a_start(
    tmp_path, run, recipe, vocabulary, tensors_equal
):
    told = export(run, out=tmp_path / "model")
    exported = Decoder.load(tmp_path / "model", vocabulary=vocabulary)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        *("model.safetensors", "config.json", "vocabulary.json", "recipe.toml", "README.md")
    }
    assert told["parameters"] == exported.num_parameters
    assert tensors_equal(
        exported.state_dict(), Decoder.load(run / "checkpoints" / "step-00000010").state_dict()
    )
    begun = pretrainer(
        replace(recipe, start=str(tmp_path / "model")), tmp_path / "again", vocabulary=vocabulary
    )
    assert tensors_equal(begun.model.state_dict(), exported.state_dict())
    # an export of the same weights is the same folder
    assert export(tmp_path / "model", out=tmp_path / "twice")["fingerprint"] == told["fingerprint"]


def test_bf16_halves_the_file(tmp_path, run):
    whole, half = export(run, out=tmp_path / "a"), export(run, out=tmp_path / "b", dtype="bf16")
    assert half["bytes"] < 0.6 * whole["bytes"]
    assert Decoder.load(tmp_path / "b").embedding.dtype == torch.bfloat16


def test_what_cannot_be_exported_or_begun_with_is_one_line(tmp_path, run, recipe, vocabulary):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    wider = replace(recipe, model=replace(recipe.model, expert_hidden=32), start=str(run))
    for act, message in (
        (lambda: export(run, out=tmp_path / "full"), "not empty"),
        (lambda: export(tmp_path, out=tmp_path / "new"), "no model at"),
        (lambda: export(run, out=tmp_path / "new", average=True), "no averaged weights"),
        (
            lambda: pretrainer(wider, tmp_path / "wider", vocabulary=vocabulary),
            "expert_hidden = 24, the recipe's model 32",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            act()
        assert "\n" not in str(error.value)
