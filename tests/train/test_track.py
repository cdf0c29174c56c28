import json
import signal
import threading

import pytest

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.train import track
from mmpt.train.metrics import last_line
from mmpt.train.pretrain import train
from mmpt.train.track import Log, Track, flatten


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars_of(folder):
    """Tag -> step -> value, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


class Hung:
    """Takes its first row and never comes back."""

    def __init__(self, *_):
        self.forever = threading.Event()

    def write(self, step, scalars):
        self.forever.wait()


class Faulty:
    """Takes every second row."""

    def __init__(self, *_):
        self.seen = []

    def write(self, step, scalars):
        self.seen.append(step)
        if step % 2:
            raise ConnectionError("no route\nto host")

    def close(self):
        raise ConnectionError("no route to host")


class Absent:
    """Is never there."""

    def __init__(self, *_):
        raise ConnectionError("no route to host")


def test_rows_are_flattened_to_paths():
    row = {"loss": None, "modality": {"image": {"loss": 2.5}}, "skipped": "why"}
    nested = {"load": {"text": [[1, 2], [3, 4]]}, "router": {"text": {"dead": [0, 1]}}}
    assert flatten(row | nested) == {
        "modality/image/loss": 2.5,
        "router/text/dead/0": 0.0,
        "router/text/dead/1": 1.0,
    }


def test_tensorboard_shows_what_the_file_says(tmp_path, vocabulary, another):
    folder = tmp_path / "run"
    for stop in (6, 10):  # the second goes on
        train(
            another(track=("tensorboard",)),
            folder,
            vocabulary=vocabulary,
            progress=False,
            on_step=lambda row, stop=stop: (
                row["step"] == stop and signal.raise_signal(signal.SIGINT)
            ),
        )
    shown, written = scalars_of(folder), rows(folder)
    assert shown["loss"] == pytest.approx({row["step"]: row["loss"] for row in written})
    text = {r["step"]: r["modality"]["text"]["loss"] for r in written if "text" in r["modality"]}
    assert shown["modality/text/loss"] == pytest.approx(text)
    assert written[-1]["dropped"] == 0


def test_steps_that_are_done_again_show_once(tmp_path):
    for first, last, value in ((1, 8, 1.0), (5, 9, 2.0)):
        with Track(tmp_path, ("tensorboard",), first=first) as places:
            for step in range(first, last):
                places.write({"step": step, "loss": value})
    assert scalars_of(tmp_path)["loss"] == {n: 1.0 if n < 5 else 2.0 for n in range(1, 9)}


def test_wandb_keeps_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(track, "PATIENCE", 60.0)  # it starts slowly where cores are busy
    with Track(tmp_path, ("wandb",), config={"steps": 2}) as places:
        places.write({"step": 1, "loss": 1.0})
    assert places.dropped == 0
    [kept] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert kept.stem == f"run-{(tmp_path / 'run-id').read_text()}"
    assert kept.stat().st_size > 0


def test_trackio_keeps_a_run_without_a_network(tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "kept")
    with Track(tmp_path, ("trackio",)) as places:
        places.write({"step": 1, "loss": 1.0})
    assert places.dropped == 0
    [run] = trackio.Api().runs("mmpt")
    assert run.name.endswith((tmp_path / "run-id").read_text())
    assert capsys.readouterr().out == ""


def test_a_hung_sink_changes_neither_weights_nor_counts(
    tmp_path, another, vocabulary, monkeypatch, caplog, tensors_equal
):
    monkeypatch.setattr(track, "ROOM", 4)
    monkeypatch.setattr(track, "PATIENCE", 0.2)
    monkeypatch.setitem(track.SINKS, "tensorboard", Hung)
    plain = train(another(), tmp_path / "plain", vocabulary=vocabulary, progress=False)
    hung = train(
        another(track=("tensorboard",)), tmp_path / "hung", vocabulary=vocabulary, progress=False
    )
    assert hung.finished
    assert hung.counters.tokens == plain.counters.tokens
    assert [row["loss"] for row in rows(tmp_path / "hung")] == [
        row["loss"] for row in rows(tmp_path / "plain")
    ]
    # one hangs, four wait, of ten
    assert rows(tmp_path / "hung")[-1]["dropped"] in (4, 5)  # the tenth is dropped after its row
    assert "does not keep up" in caplog.text
    assert "lacks 10 rows" in caplog.text
    weights = [Decoder.load(each.checkpoint).state_dict() for each in (plain, hung)]
    assert tensors_equal(*weights)


@pytest.mark.parametrize(("sink", "dropped"), [(Faulty, 2), (Absent, 3)])
def test_a_sink_that_fails_is_said_once(tmp_path, monkeypatch, caplog, sink, dropped):
    monkeypatch.setitem(track.SINKS, "wandb", sink)
    with Track(tmp_path, ("wandb",)) as places:
        for step in (1, 2, 3):
            places.write({"step": step, "loss": 1.0})
    assert places.dropped == dropped
    assert caplog.text.count("no route to host") == 1
    assert len(rows(tmp_path)) == 3


def test_a_package_that_is_missing_is_said_before_training(
    tmp_path, another, vocabulary, monkeypatch
):
    def missing(name):
        raise track.PackageNotFoundError(name)

    monkeypatch.setattr(track, "version", missing)
    with pytest.raises(UserError, match=r"pip install 'mmpt\[track\]'"):
        train(another(track=("wandb",)), tmp_path / "run", vocabulary=vocabulary)
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written_keeps_its_lines(tmp_path, caplog):
    path = tmp_path / "later" / "metrics.jsonl"
    log = Log(path)
    log.write({"step": 1})
    log.write({"step": 2})
    assert log.failed == 2
    assert caplog.text.count("training goes on") == 1
    path.parent.mkdir()
    log.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert last_line(path) == {"step": 3}
