"""Progress: a bar on a terminal, a few plain lines elsewhere."""

import io
import sys

import pytest

from mmpt import progress
from mmpt.progress import Bar


class Terminal(io.StringIO):
    """What stderr is when a person looks at it."""

    def isatty(self) -> bool:
        return True


def test_a_file_gets_the_first_and_the_last_line_of_many_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Bar(total=1000, desc="train") as bar:
        for step in range(1000):
            bar.update()
            bar.set_postfix(loss=step)
    first, last = capsys.readouterr().err.split("\n")[:-1]
    assert first.startswith("train:   0% 0/1000")
    assert last.startswith("train: 100% 1000/1000")
    assert last.endswith("loss=999]")


def test_a_file_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Bar(total=5, desc="train", mininterval=0) as bar:
        for _ in range(5):
            bar.update()
    lines = [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()]
    assert "\r" not in "".join(lines)
    assert lines == [f"train: {20 * done:3d}% {done}/5" for done in (0, 2, 4, 5)]


def test_what_is_iterated_over_comes_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Bar(range(3), desc="read", unit="shard")) == [0, 1, 2]
    assert list(Bar(iter("ab"))) == ["a", "b"]
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(Bar(range(3), desc="read"))
    assert "\rread: 100%|" in sys.stderr.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(Bar(range(3), desc="read"))
    assert "\r" not in sys.stderr.getvalue()


def test_progress_can_be_turned_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(Bar(range(3))) == [0, 1, 2]
    with Bar(total=3, disable=False) as bar:
        bar.update()
        bar.set_postfix_str("x")
    assert capsys.readouterr().err == ""
