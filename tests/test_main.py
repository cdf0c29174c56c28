"""The command line: every verb helps, a mistake is one line, machines get JSON."""

import importlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from mmpt.__main__ import VERBS, _parser, main
from mmpt.config import UserError
from mmpt.parts import Image


def add_verb(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    monkeypatch.setitem(VERBS, "try", (f"{__name__}:{function}", "try something", "a b"))


def echo(first: int, rest: list[str], *, name: str = "x", loud: bool = False) -> dict:
    """Give back what came in."""
    return {"first": first, "rest": rest, "name": name, "loud": loud}


def mistake() -> dict:
    """Be wrong."""
    raise UserError("height 7 is no multiple of 8; use 8 or pad")


def full_disk() -> dict:
    """Run out of space."""
    raise OSError(28, "No space left on device", "/somewhere/file")


def interrupted() -> dict:
    """Be stopped."""
    raise KeyboardInterrupt


def stopped() -> dict:
    """Say that it was stopped."""
    return {"finished": False, "exit_status": 130}


def bug() -> dict:
    """Fail for a reason that is ours."""
    raise RuntimeError("a bug")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*verb.split(), "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert f"usage: mmpt {verb}" in out
    assert f"example: mmpt {verb}" in out
    assert "--json" in out


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_example_of_every_verb_can_be_read(verb: str) -> None:
    path, summary, example = VERBS[verb]
    module, function = path.split(":")
    parser = _parser(verb, getattr(importlib.import_module(module), function), summary, example)
    parser.parse_intermixed_args(shlex.split(example))


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {verb} " in out for verb in VERBS)


def test_help_of_a_group_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data inspect" in out
    assert "tokenizer" not in out
    assert main(["data"]) == 2
    assert "data inspect" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["fly"], ["data", "fly"], ["tokenizers", "list"]])
def test_an_unknown_verb_lists_the_known_ones(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"unknown verb '{' '.join(arguments)}'" in captured.err
    assert all(verb in captured.err for verb in VERBS)


@pytest.mark.parametrize("function", ["mistake", "full_disk"])
def test_a_mistake_is_one_line_on_stderr_and_exit_status_2(
    function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_verb(monkeypatch, function)
    for arguments in (["try"], ["try", "--json"]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert captured.err.startswith("mmpt try:")
        assert "Traceback" not in captured.err
    if function == "full_disk":
        assert "/somewhere/file: No space left on device" in captured.err


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    add_verb(monkeypatch, "bug")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["try"])
    add_verb(monkeypatch, "mistake")
    monkeypatch.setenv("MMPT_DEBUG", "1")
    with pytest.raises(UserError):
        main(["try"])


def test_an_interrupted_run_says_so_and_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_verb(monkeypatch, "interrupted")
    assert main(["try"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1
    add_verb(monkeypatch, "stopped")
    assert main(["try", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["finished"] is False


def test_arguments_arrive_with_their_types(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_verb(monkeypatch, "echo")
    assert main(["try", "3", "a", "b", "--loud", "--name", "y", "--json"]) == 0
    want = {"first": 3, "rest": ["a", "b"], "name": "y", "loud": True}
    assert json.loads(capsys.readouterr().out) == want
    assert main(["try", "3", "a"]) == 0
    assert capsys.readouterr().out == "first: 3\nrest: ['a']\nname: x\nloud: False\n"
    capsys.readouterr()
    assert main(["try", "3", "--name", "y", "a", "--loud", "b", "--json"]) == 0  # in any order
    assert json.loads(capsys.readouterr().out) == want
    for wrong in (["try"], ["try", "many", "a"], ["try", "3", "a", "--quiet"]):
        with pytest.raises(SystemExit) as done:
            main(wrong)
        assert done.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_doctor_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"python", "cuda", "packages", "optional", "runs", "problems"} <= set(found)
    assert all(found["packages"].values())


def test_a_roundtrip_through_the_command_line(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image(np.zeros((9, 13, 3), np.uint8)).save(tmp_path / "a.png")
    command = ["tokenizer", "roundtrip", str(zoo / "image"), str(tmp_path / "a.png")]
    assert main([*command, "--out", str(tmp_path / "b.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokenizer"], found["codes"], found["shape"]) == ("image", 4, [2, 2])
    assert Image.load(tmp_path / "b.png").pixels.shape == (9, 13, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenizer", "roundtrip", "image-f9", "cat.png", "--out", "x.png"],
        ["tokenizer", "train", "absent.toml"],
        ["tokenizer", "eval", "image-f9"],
        ["data", "inspect", "absent.tar"],
        ["data", "prepare", "emojis"],
        ["encode", "absent.tar", "--out", "tokens"],
        ["train", "absent.toml", "--out", "run"],
        ["adapt", "absent.toml", "--out", "run"],
        ["generate", "absent", "red apple"],
        ["eval", "absent", "--tokens", "absent"],
        ["quickstart", "--minutes", "0"],
    ],
)
def test_what_is_not_there_is_one_line(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, last = captured.err.splitlines()
    assert last.startswith("mmpt ")
    assert all("%|" in line for line in before if line)  # nothing else but progress
