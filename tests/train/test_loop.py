import json
import signal
from dataclasses import replace

import pytest
import torch

from mmpt.config import UserError, to_toml
from mmpt.model.transformer import Decoder
from mmpt.process import pick_device
from mmpt.processor import ProcessorSettings
from mmpt.train.checkpoint import latest, list_checkpoints
from mmpt.train.export import export
from mmpt.train.pretrain import pretrainer, train, train_command
from mmpt.train.recipe import TrainRecipe, load_run_recipe


@pytest.fixture
def run(recipe, vocabulary):
    """Trains in a folder without a progress bar."""

    def go(folder, recipe=recipe, **options):
        return train(recipe, folder, vocabulary=vocabulary, progress=False, **options)

    return go


def weights(folder):
    return Decoder.load(latest(folder / "checkpoints")).state_dict()


def lines(folder, *, timed=False):
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not timed:
        for line in kept:
            for key in ("seconds", "laps", "step_seconds", "speed"):
                del line[key]
    return kept


def stop_at(*steps):
    """Sends SIGINT to this process after these steps."""

    def on_step(metrics):
        if metrics["step"] in steps:
            signal.raise_signal(signal.SIGINT)

    return on_step


def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, run, tensors_equal):
    whole = run(tmp_path / "whole")
    assert whole.finished
    for folder, step in ((tmp_path / f"stopped-{step}", step) for step in (1, 5, 9)):
        stopped = run(folder, on_step=stop_at(step))
        assert not stopped.finished
        assert stopped.counters.step == step
        resumed = run(folder)
        assert resumed.finished
        assert tensors_equal(weights(folder), weights(tmp_path / "whole"))
        assert lines(folder) == lines(tmp_path / "whole")
        ours, theirs = (
            json.loads((latest(f / "checkpoints") / "loader-00000.json").read_text())
            for f in (folder, tmp_path / "whole")
        )
        assert ours == theirs


def test_a_run_killed_between_checkpoints_repeats_its_last_steps(tmp_path, run, tensors_equal):
    class Killed(Exception):
        pass

    def kill(metrics):
        if metrics["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", on_step=kill)
    (tmp_path / "killed" / "metrics.jsonl").open("a").write('{"step": 8, "lo')  # half a line
    assert latest(tmp_path / "killed" / "checkpoints").name == "step-00000004"
    run(tmp_path / "killed")
    run(tmp_path / "whole")
    assert tensors_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)]
)
def test_a_signal_ends_a_run_with_a_loadable_checkpoint(
    tmp_path, run, number, status, vocabulary, caplog
):
    before = signal.getsignal(number)
    result = run(
        tmp_path / "run",
        on_step=lambda metrics: metrics["step"] == 3 and signal.raise_signal(number),
    )
    assert result.to_json()["exit_status"] == status
    assert "stopped at step 3 of 10" in caplog.text
    assert signal.getsignal(number) == before
    assert result.checkpoint.name == "step-00000003"
    Decoder.load(result.checkpoint, vocabulary=vocabulary)


def test_a_signal_that_the_time_is_up_asks_slurm_for_the_job_again(tmp_path, run, monkeypatch):
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "123")

    def stop(number):
        return lambda metrics: metrics["step"] == 2 and signal.raise_signal(number)

    run(tmp_path / "ended", on_step=stop(signal.SIGTERM))
    assert not asked.exists()
    run(tmp_path / "again", on_step=stop(signal.SIGUSR1))
    assert asked.read_text() == "requeue 123\n"


def test_averaged_weights_are_kept_resumed_and_exported(tmp_path, run, another, tensors_equal):
    recipe = another(ema=0.9)
    run(tmp_path / "stopped", recipe, on_step=stop_at(5))
    run(tmp_path / "stopped", recipe)
    run(tmp_path / "whole", recipe)
    for name in ("stopped", "whole"):
        export(tmp_path / name, out=tmp_path / f"{name}-average", average=True)
    averages = [
        Decoder.load(tmp_path / f"{name}-average").state_dict() for name in ("stopped", "whole")
    ]
    assert tensors_equal(*averages)
    assert not tensors_equal(averages[0], weights(tmp_path / "whole"))


def test_a_finished_run_stays_as_it_is(tmp_path, run):
    first = run(tmp_path / "run")
    again = run(tmp_path / "run")
    assert again.finished
    assert again.counters == first.counters
    assert again.checkpoint == first.checkpoint
    assert again.last == first.last
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2


def test_metrics_say_what_was_learned_from(tmp_path, run, another):
    run(tmp_path / "run", another(steps=60))
    first, *_, last = lines(tmp_path / "run", timed=True)
    assert set(first["modality"]) <= {"text", "image", "video", "speech"}
    total = sum(values["loss"] * values["tokens"] for values in first["modality"].values())
    counted = sum(values["tokens"] for values in first["modality"].values())
    assert first["loss"] == pytest.approx(total / counted, rel=1e-5)
    assert counted < first["step_tokens"] <= 2 * 64
    assert sum(first["share"].values()) == pytest.approx(1, abs=1e-3)
    for name, total in last["flops"].items():
        assert total == sum(row["step_flops"].get(name, 0) for row in lines(tmp_path / "run"))
    assert 0 < last["speed"]["mfu"] < 1
    assert last["speed"]["ids"] == pytest.approx(
        last["step_tokens"] / last["step_seconds"], rel=0.1
    )
    for group, load in first["load"].items():
        assert len(load) == 2, group  # layers
    for group in ("text", "visual"):
        for name in ("entropy", "imbalance", "dead"):
            assert len(last["router"][group][name]) == 2  # layers
    assert set(last["laps"]) == {"data", "ranks", "forward", "backward", "optimizer", "checkpoint"}
    waited = [
        row["step"] for row in lines(tmp_path / "run", timed=True) if row["laps"]["checkpoint"]
    ]
    assert waited == [5 + 4 * n for n in range(14)]  # told after each that was begun
    assert sum(sum(sum(load) for load in loads) for loads in first["load"].values()) == (
        2 * first["step_tokens"]
    )
    assert last["modality"]["text"]["loss"] < 0.8 * first["modality"]["text"]["loss"]
    assert last["seconds"] > first["seconds"]


def test_a_step_can_be_timed_without_a_trace(tmp_path, recipe, vocabulary):
    assert 0 < pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary).time_step() < 10
    assert latest(tmp_path / "run" / "checkpoints") is None
    assert train(recipe, tmp_path / "run", vocabulary=vocabulary, progress=False).finished


def test_accumulated_batches_are_one_step(tmp_path, run, another):
    both = another(accumulate=2, steps=3)
    assert run(tmp_path / "run", both).finished
    assert lines(tmp_path / "run")[0]["step_tokens"] > 64 * 2


def test_bf16_trains_and_keeps_weights_in_fp32(tmp_path, run, another):
    result = run(tmp_path / "bf16", another(precision="bf16", steps=2))
    assert result.last["loss"] is not None
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have such products")
def test_fp8_is_refused_before_data_is_read_where_there_is_none(tmp_path, run, another):
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        run(tmp_path / "run", another(precision="fp8"))
    assert not (tmp_path / "run").exists()


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, recipe, poisoned):
    trainer = poisoned(recipe, tmp_path / "run", bad={2})
    trainer.step()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step()
    assert metrics["loss"] is None
    assert metrics["bad_steps"] == 1
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    trainer.step()
    assert not all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert trainer.guard.in_a_row == 0


def test_too_many_bad_steps_stop_the_run_in_one_line(tmp_path, another, poisoned):
    recipe = another(max_bad_steps=3)
    trainer = poisoned(recipe, tmp_path / "run", bad={6, 7, 8})
    with pytest.raises(UserError, match="3 steps in a row were skipped") as error:
        trainer.run(progress=False)
    assert "step-00000004" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_only_with_the_same_recipe(tmp_path, run, another, recipe):
    run(tmp_path / "run", on_step=stop_at(2))
    changed = another(optim=replace(recipe.optim, lr=1e-3))
    with pytest.raises(UserError, match=r"optim\.lr = 0\.01, now it is 0\.001") as error:
        run(tmp_path / "run", changed)
    assert "\n" not in str(error.value)
    assert run(tmp_path / "run", another(keep=1)).finished


def test_a_model_of_another_vocabulary_is_refused(tmp_path, recipe, make_vocabulary):
    with pytest.raises(UserError, match="vocabulary"):
        train(recipe, tmp_path / "run", vocabulary=make_vocabulary("image-2"), progress=False)


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write") as error:
        run(tmp_path / "file" / "run")
    assert "\n" not in str(error.value)


def test_the_command_reads_a_recipe_with_its_vocabulary(tmp_path, recipe, vocabulary):
    vocabulary.save(tmp_path / "vocabulary.json")
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(replace(recipe, vocabulary=str(tmp_path / "vocabulary.json"))))
    read, _ = load_run_recipe(TrainRecipe, path)
    assert read.model == recipe.model
    result = train_command(path, ["steps=2"], out=tmp_path / "run")
    assert result["finished"]
    assert result["step"] == 2
    json.dumps(result)


def test_an_unknown_recipe_key_names_the_nearest(tmp_path, recipe):
    path = tmp_path / "recipe.toml"
    path.write_text("stepz = 3\n" + to_toml(recipe))
    with pytest.raises(UserError, match="did you mean 'steps'"):
        load_run_recipe(TrainRecipe, path)


def test_a_missing_vocabulary_is_named(tmp_path, recipe):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    with pytest.raises(UserError, match="vocabulary is missing"):
        load_run_recipe(TrainRecipe, path)


def test_a_device_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="cannot be used here") as error:
        pick_device("nonsense")
    assert "\n" not in str(error.value)


def test_every_checkpoint_holds_the_settings_of_its_processor(tmp_path, run, another, vocabulary):
    encoded = tmp_path / "encoded"
    vocabulary.save(encoded / "vocabulary.json")
    settings = ProcessorSettings(("text-2k",), 32)
    settings.save(encoded)
    recipe = another(vocabulary=str(encoded / "vocabulary.json"))
    result = run(tmp_path / "run", recipe, on_step=stop_at(3))
    assert ProcessorSettings.load(result.checkpoint) == settings
    ProcessorSettings(("image-f8",), 64).save(encoded)  # encoded again while the run stood still
    assert ProcessorSettings.load(run(tmp_path / "run", recipe).checkpoint) == settings


def test_a_run_goes_on_where_its_data_was_moved(tmp_path, run, recipe, another):
    run(tmp_path / "run", on_step=stop_at(2))
    [(name, source)] = recipe.data.sources.items()
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.tokens.tar").rename(tmp_path / "moved" / "a.tokens.tar")
    moved = replace(source, shards=(str(tmp_path / "moved" / "*.tokens.tar"),))
    assert run(tmp_path / "run", another(data=replace(recipe.data, sources={name: moved}))).finished
    heavier = replace(recipe.data, sources={name: replace(moved, weight=2.0)})
    with pytest.raises(UserError, match=r"data\.sources\.a\.weight"):
        run(tmp_path / "run", another(data=heavier))


def test_data_that_ends_before_the_steps_is_said_in_one_line(tmp_path, run, recipe, another):
    [(name, source)] = recipe.data.sources.items()
    once = replace(recipe.data, sources={name: replace(source, max_epochs=1.0)})
    for _ in range(2):  # and again, when the run is resumed
        with pytest.raises(UserError, match=r"data ended after step \d+ of 500, .* saved") as error:
            run(tmp_path / "run", another(data=once, steps=500, accumulate=3))
        assert "\n" not in str(error.value)
    last = lines(tmp_path / "run")[-1]
    assert latest(tmp_path / "run" / "checkpoints").name == f"step-{last['step']:08d}"
    assert last["sources"] == {name: 1.0}


def test_a_run_with_workers_equals_one_without(tmp_path, run, recipe, another, tensors_equal):
    run(tmp_path / "none")
    run(tmp_path / "some", on_step=stop_at(3))
    run(tmp_path / "some", another(data=replace(recipe.data, workers=1)))
    assert tensors_equal(weights(tmp_path / "some"), weights(tmp_path / "none"))
    assert lines(tmp_path / "some") == lines(tmp_path / "none")


def test_a_run_begun_before_an_option_was_there_goes_on(tmp_path, run):
    run(tmp_path / "run", on_step=stop_at(2))
    path = tmp_path / "run" / "recipe.toml"
    path.write_text(path.read_text().replace('packing = "best-fit"\n', ""))
    assert run(tmp_path / "run").finished


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(tmp_path, run, another):
    recipe = another(device="cuda")
    run(tmp_path / "stopped", recipe, on_step=stop_at(5))
    assert run(tmp_path / "stopped", recipe).finished
    run(tmp_path / "whole", recipe)
    ours, theirs = (weights(tmp_path / name) for name in ("stopped", "whole"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], msg=name)
