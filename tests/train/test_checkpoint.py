import json
from dataclasses import replace

import pytest
import torch

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.train.checkpoint import (
    Checkpoints,
    Moment,
    latest,
    list_checkpoints,
)
from mmpt.train.optim import OptimConfig, build_optimizer
from mmpt.train.restore import load_checkpoint


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
    def at(step, *, folder=tmp_path, **options):
        saved = Checkpoints(folder, **options)
        return saved.save(*trained, moment(step, vocabulary))

    return at


def moment(step, vocabulary, **more):
    loader = {"format_version": 2, "settings": {}, "rows": 8, "weights": None, "streams": {}}
    state = {"note": step}
    return Moment(step=step, state=state, loader=loader, vocabulary=vocabulary, **more)


def test_model_optimiser_and_state_come_back(save, trained, config, tensors_equal):
    model, optimizer = trained
    path = save(7)
    other = Decoder.from_config(config, seed=1)
    restored = build_optimizer(other, OptimConfig())
    state, _ = load_checkpoint(path, model=other, optimizer=restored)
    assert state["note"] == 7
    assert state["loader"]["rows"] == 8
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


def test_every_so_many_steps_one_is_kept_for_good(tmp_path, save):
    for step in (4, 6, 8, 10, 11):
        save(step, keep=1, keep_every=4)
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["04", "08", "11"]


def test_what_is_trained_while_a_checkpoint_is_written_is_not_in_it(
    tmp_path, trained, vocabulary, tensors_equal
):
    model, optimizer = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = Checkpoints(tmp_path)
    path = saved.begin(model, optimizer, moment(1, vocabulary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert saved.wait() is None
    assert tensors_equal(Decoder.load(path).state_dict(), before)
    again = saved.begin(model, optimizer, moment(2, vocabulary))  # with the same copies
    assert saved.wait() is None
    assert tensors_equal(Decoder.load(again).state_dict(), model.state_dict())


def test_more_tensors_come_back_by_name(tmp_path, trained, vocabulary, tensors_equal):
    model, optimizer = trained
    average = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    saved = Checkpoints(tmp_path)
    path = saved.save(model, optimizer, moment(1, vocabulary, extra={"average": average}))
    _, more = load_checkpoint(path, model=model, extra=("average", "other"))
    assert more.keys() == {"average"}
    assert tensors_equal(more["average"], average)


def test_the_same_step_can_be_saved_again(save):
    assert save(3) == save(3)


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path, save):
    (tmp_path / "step-00000050.tmp").mkdir()
    assert latest(tmp_path) is None
    save(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("part", ["model", "optimizer", "config.json", "loader-00000.json"])
def test_a_damaged_checkpoint_is_refused_in_one_line(save, trained, part):
    path = save(1)
    name = part if "." in part else f"{part}/{next((path / part).iterdir()).name}"
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
    (path / "state.json").write_text(json.dumps(data | {"format_version": 3}))
    with pytest.raises(UserError, match="format 3; this mmpt reads 2"):
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


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(
    tmp_path, trained, vocabulary, limit_files
):
    model, optimizer = trained
    saved = Checkpoints(tmp_path)
    saved.save(model, optimizer, moment(1, vocabulary))
    saved.save(model, optimizer, moment(2, vocabulary))
    limit_files(4096)
    saved.begin(model, optimizer, moment(3, vocabulary))
    reason = saved.wait()
    limit_files(None)
    assert "cannot write checkpoint" in reason
    assert "\n" not in reason
    assert saved.failed == 1
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "2"]
    saved.save(model, optimizer, moment(3, vocabulary))
    assert latest(tmp_path).name.endswith("3")
