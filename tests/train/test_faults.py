"""One run that meets everything at once: NaN, a full disk, SIGTERM, and a sink that hangs."""

import json
import resource
import signal
import threading

import pytest

from mmpt.model.transformer import Decoder
from mmpt.train import track
from mmpt.train.checkpoint import list_checkpoints
from mmpt.train.loop import Trainer
from mmpt.train.loss import NextToken

FULL = 4096  # bytes: no file may be larger while the disk is full


class Poisoned(NextToken):
    """The next-id objective, whose loss is NaN at one call."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad, self.calls = bad, 0

    def losses(self, model, batch):
        self.calls += 1
        losses = super().losses(model, batch)
        if self.calls == self.bad:
            losses.total = losses.total * float("nan")
        return losses


class Hung:
    """A sink that never comes back."""

    def __init__(self, *arguments, **options) -> None:
        pass

    def write(self, step, values) -> None:
        threading.Event().wait()

    def close(self) -> None:
        pass


@pytest.fixture
def file_limit():
    """Sets the largest size of a file, beyond which writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_run_that_meets_everything_ends_as_one_that_met_the_nan_alone(
    tmp_path, another, vocabulary, monkeypatch, tensors_equal, file_limit
):
    monkeypatch.setattr(track, "PATIENCE", 0.2)
    monkeypatch.setitem(track.SINKS, "tensorboard", Hung)

    def trainer(name, recipe, bad):
        return Trainer(
            recipe,
            tmp_path / name,
            build=lambda: Decoder.from_config(recipe.model, seed=recipe.seed),
            vocabulary=vocabulary,
            objective=Poisoned(bad),
        )

    def trouble(metrics):
        if metrics["step"] == 3:
            file_limit(FULL)  # the checkpoint after step 4 and lines of the log meet it
        if metrics["step"] == 6:
            troubled.saved.wait()
            file_limit(None)
        if metrics["step"] == 7:
            signal.raise_signal(signal.SIGTERM)

    alone = trainer("alone", another(), bad=2).run(progress=False)
    troubled = trainer("troubled", another(track=("tensorboard",)), bad=2)
    stopped = troubled.run(progress=False, on_step=trouble)
    assert stopped.to_json()["exit_status"] == 0
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "troubled" / "checkpoints")] == [
        "7"
    ]
    ended = trainer("troubled", another(track=("tensorboard",)), bad=0).run(progress=False)
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
