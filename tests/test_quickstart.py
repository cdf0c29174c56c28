"""The main job refuses what it cannot do in one line, before it works for minutes."""

from pathlib import Path

import pytest

from mmpt.config import UserError
from mmpt.quickstart import Job, quickstart


def test_minutes_must_be_positive(tmp_path: Path) -> None:
    for minutes in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="minutes"):
            quickstart(out=tmp_path, minutes=minutes)


def test_a_run_goes_on_only_as_it_was_begun(tmp_path: Path) -> None:
    Job(tmp_path / "run", minutes=2.0, seed=0)
    Job(tmp_path / "run", minutes=2.0, seed=0)
    with pytest.raises(UserError, match="was begun with"):
        Job(tmp_path / "run", minutes=3.0, seed=0)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)) as caught:
        quickstart(out=tmp_path / "file" / "run", minutes=1.0)
    assert "\n" not in str(caught.value)


def test_an_odd_state_file_is_one_line(tmp_path: Path) -> None:
    for text in ("{}", "[", "[]"):
        (tmp_path / "quickstart.json").write_text(text)
        with pytest.raises(UserError, match="quickstart"):
            Job(tmp_path, minutes=1.0, seed=0)
