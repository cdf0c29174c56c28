"""One run that meets everything at once: NaN, a full disk, SIGTERM, and a sink that hangs."""

import json
import signal
import threading

from mmpt.model.transformer import Decoder
from mmpt.train import track
from mmpt.train.checkpoint import list_checkpoints

FULL = 4096  # bytes: no file may be larger while the disk is full


class Hung:
    """A sink that never comes back."""

    def __init__(self, *arguments, **options) -> None:
        pass

    def write(self, step, values) -> None:
        threading.Event().wait()

    def close(self) -> None:
        pass


def test_a_run_that_meets_everything_ends_as_one_that_met_the_nan_alone(
    tmp_path, another, poisoned, monkeypatch, tensors_equal, limit_files
):
    monkeypatch.setattr(track, "PATIENCE", 0.2)
    monkeypatch.setitem(track.SINKS, "tensorboard", Hung)

    def trouble(metrics):
        if metrics["step"] == 3:
            limit_files(FULL)  # the checkpoint after step 4 and lines of the log meet it
        if metrics["step"] == 6:
            troubled.saved.wait()
            limit_files(None)
        if metrics["step"] == 7:
            signal.raise_signal(signal.SIGTERM)

    recipe = another(track=("tensorboard",))
    alone = poisoned(another(), tmp_path / "alone", bad={2}).run(progress=False)
    troubled = poisoned(recipe, tmp_path / "troubled", bad={2})
    stopped = troubled.run(progress=False, on_step=trouble)
    assert stopped.to_json()["exit_status"] == 0
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "troubled" / "checkpoints")] == [
        "7"
    ]
    ended = poisoned(recipe, tmp_path / "troubled", bad=set()).run(progress=False)
    assert ended.finished
    assert tensors_equal(*(Decoder.load(each.checkpoint).state_dict() for each in (ended, alone)))
    assert ended.counters.bad_steps == alone.counters.bad_steps == 1
    assert ended.counters.tokens == alone.counters.tokens
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("troubled", "alone")
    ]
    assert [row["step"] for row in lines[0]] == list(range(1, 11))
    assert [row["loss"] for row in lines[0]] == [row["loss"] for row in lines[1]]
    assert lines[0][1]["skipped"] == "the loss is not finite"
    assert lines[0][6]["failed_checkpoints"] == 1
