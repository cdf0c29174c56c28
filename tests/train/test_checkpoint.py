import json
from dataclasses import replace

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.train.checkpoint import latest, list_checkpoints, load_checkpoint, save_checkpoint
from mmpt.train.optim import OptimConfig, build_optimizer


@pytest.fixture
def trained(model):
    """A model and an optimiser that has moments."""
    optimizer = build_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


@pytest.fixture
def save(tmp_path, trained, vocabulary):
    def at(step, *, folder=tmp_path, keep=2):
        model, optimizer = trained
        options = {"vocabulary": vocabulary, "state": {"note": step}, "keep": keep}
        return save_checkpoint(folder, step, model=model, optimizer=optimizer, **options)

    return at


def test_model_optimiser_and_state_come_back(save, trained, config, tensors_equal):
    model, optimizer = trained
    path = save(7)
    other = Decoder.from_config(config, seed=1)
    restored = build_optimizer(other, OptimConfig())
    assert load_checkpoint(path, model=other, optimizer=restored) == {"note": 7}
    assert tensors_equal(model.state_dict(), other.state_dict())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert tensors_equal(optimizer.state[ours], restored.state[theirs])


def test_a_checkpoint_is_a_model_folder(save, trained, vocabulary, tensors_equal):
    loaded = Decoder.load(save(1), vocabulary=vocabulary)
    assert tensors_equal(loaded.state_dict(), trained[0].state_dict())


def test_the_last_ones_are_kept(tmp_path, save):
    assert latest(tmp_path) is None
    for step in (2, 9, 10, 100):
        save(step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert latest(tmp_path).name == "step-00000100"


def test_the_same_step_can_be_saved_again(save):
    assert save(3) == save(3)


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path, save):
    (tmp_path / "step-00000050.123.tmp").mkdir()
    assert latest(tmp_path) is None
    save(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_refused_in_one_line(save, trained, name):
    path = save(1)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(UserError, match=name) as error:
        load_checkpoint(path, model=trained[0])
    assert "\n" not in str(error.value)
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        load_checkpoint(path, model=trained[0])


def test_a_newer_format_is_refused(save, trained):
    path = save(1)
    data = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(data | {"format_version": 2}))
    with pytest.raises(UserError, match="format 2; this mmpt reads 1"):
        load_checkpoint(path, model=trained[0])
    (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(path, model=trained[0])


def test_a_checkpoint_of_another_model_is_refused_in_one_line(save, config):
    other = Decoder.from_config(replace(config, num_layers=1))
    with pytest.raises(UserError, match="another model") as error:
        load_checkpoint(save(1), model=other)
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, save):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoint") as error:
        save(1, folder=tmp_path / "file")
    assert "\n" not in str(error.value)
