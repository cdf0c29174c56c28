import json
import signal

import pytest

from mmpt.config import UserError
from mmpt.train.pretrain import train


@pytest.fixture
def run(tmp_path, another, vocabulary):
    """Trains for some steps in tmp_path/run; `when` happens after step 2."""

    def go(steps=6, when=None, **changes):
        return train(
            another(steps=steps, **changes),
            tmp_path / "run",
            vocabulary=vocabulary,
            progress=False,
            on_step=lambda row: row["step"] == 2 and when and when(),
        )

    return go


def names(folder):
    return sorted(path.name for path in (folder / "run" / "profile").iterdir())


def events(folder, name):
    """How often each operator was called."""
    trace = json.loads((folder / "run" / "profile" / name).read_text())
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]


def test_a_signal_records_the_next_three_steps(tmp_path, run):
    before = signal.getsignal(signal.SIGUSR2)
    run(when=lambda: signal.raise_signal(signal.SIGUSR2))
    assert names(tmp_path) == ["step-3-rank-0.json", "step-3-rank-0.txt"]
    assert events(tmp_path, "step-3-rank-0.json").count("aten::_fused_adamw_") >= 3
    table = (tmp_path / "run" / "profile" / "step-3-rank-0.txt").read_text()
    assert table.startswith("steps 3 to 5\n")
    assert "aten::mm" in table
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_file_does_so_once(tmp_path, run):
    run(8, when=lambda: (tmp_path / "run" / "profile-now").touch())
    assert names(tmp_path) == ["step-3-rank-0.json", "step-3-rank-0.txt"]
    assert not (tmp_path / "run" / "profile-now").exists()


def test_the_recipe_says_which_steps_and_a_run_may_end_before(tmp_path, run):
    run(3, profile=(2, 4))
    assert names(tmp_path) == ["step-2-rank-0.json", "step-2-rank-0.txt"]
    text = (tmp_path / "run" / "profile" / "step-2-rank-0.txt").read_text()
    assert text.startswith("steps 2 to 3\n")
    assert run(3).finished  # it may be left out again
    with pytest.raises(UserError, match=r"profile = \[2\]; use \[first step, number of steps\]"):
        run(profile=(2,))


def test_a_full_disk_stops_no_training(tmp_path, run, caplog, limit_files):
    def fill():
        limit_files(1 << 15)
        signal.raise_signal(signal.SIGUSR2)

    with pytest.raises(UserError, match="cannot write checkpoint"):  # the last one of all
        run(when=fill, checkpoint_every=100, steps=5)
    limit_files(None)
    assert caplog.text.count("training goes on") == 1
    assert "step-3-rank-0.json" not in names(tmp_path)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 5


def test_a_folder_that_cannot_be_made_stops_no_training(tmp_path, run, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    assert run(5, profile=(1, 2)).finished
    assert "no profile: " in caplog.text
