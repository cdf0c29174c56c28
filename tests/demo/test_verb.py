"""`mmpt demo` on the command line: what it says where it cannot begin."""

import socket
from pathlib import Path

import pytest

from mmpt.__main__ import main


def test_a_model_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["demo", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no model at" in said


def test_a_port_that_is_taken_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["demo", str(tmp_path), "--port", str(other.getsockname()[1])]) == 2
    assert "give another --port" in capsys.readouterr().err
    assert main(["demo", str(tmp_path), "--port", "99999"]) == 2
