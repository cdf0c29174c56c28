"""The command line: every verb helps, a mistake is one line, machines get JSON."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmpt
from mmpt.__main__ import STATUSES, TOUR, VERBS, main
from mmpt.command import Parser, build_parser
from mmpt.config import UserError
from mmpt.parts import Image

ROOT = Path(mmpt.__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# a verb of the test's, run as the program is: python -c SCRIPT FUNCTION [ARGUMENTS]
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from mmpt.__main__ import VERBS, main
sys.modules["try"] = sys.modules["__main__"]
def bad(): return {{"ok": False, "exit_status": 1}}
def mistake(): raise __import__("mmpt.config").config.UserError("7 is no multiple of 8; use 8")
def bug(): raise RuntimeError("a bug")
def slow():
    print("waiting", flush=True)
    __import__("time").sleep(60)
def long(): return {{"lines": "x" * 10_000_000}}
def loud():
    print("a library speaks")
    return {{"loss": float("nan"), "rows": [1.5, float("inf")]}}
VERBS["try"] = ("try:" + sys.argv[1], "try something", "")
sys.exit(main(["try", *sys.argv[2:]]))
"""


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


def parser_of(verb: str) -> Parser:
    path, summary, examples = VERBS[verb]
    module, function = path.split(":")
    found = getattr(importlib.import_module(module), function)
    return build_parser(f"mmpt {verb}", found, summary, examples)


def read_line(line: str) -> None:
    """Fails where `line`, such as `mmpt train RECIPE`, is not what its verb takes."""
    words = shlex.split(line, comments=True)[1:]
    verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    assert verb in VERBS, line
    parser_of(verb).read(words[len(verb.split()) :])


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_helps_by_examples_that_it_takes_and_speaks_json(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main([*verb.split(), "--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert f"usage: mmpt {verb}" in out
    examples = out.split("\nexamples:\n")[1].splitlines()
    assert len(examples) >= 1
    for line in examples:
        assert line.startswith(f"  mmpt {verb}")
        read_line(line)
        read_line(f"{line} --json")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_says_in_a_few_words_what_it_does_and_returns_a_dict(verb: str) -> None:
    path, summary, _ = VERBS[verb]
    assert len(summary) < 90
    assert summary[0].islower()
    assert not summary.endswith(".")
    module, function = path.split(":")
    found = importlib.import_module(module)
    kind = getattr(found, function).__annotations__["return"]
    kind = getattr(kind, "__origin__", kind)
    assert issubclass(kind, dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_the_pages_can_be_read(page: Path) -> None:
    for line in re.findall(r"^ {4,}(mmpt .*)$", page.read_text(), re.MULTILINE):
        if not re.match(r"mmpt (\w+ )?--(help|version|json)", line):
            read_line(line)


def test_help_lists_every_verb_and_status_and_its_examples_can_be_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {verb} " in out for verb in VERBS)
        assert all(f"  {status} " in out for status in STATUSES)
        assert TOUR.splitlines()[0] in out
    for line in TOUR.splitlines():
        read_line(line)


def test_the_page_of_the_command_line_names_every_status() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    assert [int(each) for each in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == [*STATUSES]


def test_help_and_version_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == main(["--help", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == second
    assert [row["verb"] for row in first["verbs"]] == [*VERBS]
    assert main(["--version"]) == main(["--version", "--json"]) == 0
    plain, as_json = capsys.readouterr().out.splitlines()
    assert json.loads(as_json) == {"version": plain} == {"version": mmpt.__version__}


def test_help_of_a_group_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data inspect" in out
    assert "tokenizer" not in out
    assert main(["data"]) == 2
    err = capsys.readouterr().err
    assert "data inspect" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("fly", "mmpt --help lists what there is"),
        ("trian x.toml --out y", "'trian'; did you mean mmpt train?"),
        ("data lst", "'data lst'; did you mean mmpt data list?"),
        ("dta list", "'dta'; did you mean mmpt data list?"),
        ("tokenizers list", "did you mean mmpt tokenizer list?"),
        ("data fly", "there are: data list, data prepare"),
        ("--loud", "unknown option --loud"),
    ],
)
def test_an_unknown_verb_names_the_nearest(
    line: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert hint in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("try 3 a --nmae y", "unknown option --nmae, did you mean --name?"),
        ("try 3 a --nmae=y", "unknown option --nmae, did you mean --name?"),
        ("try 3 a --zzzzzz", "unknown option --zzzzzz;"),
        ("--jsn try 3 a", "unknown option --jsn, did you mean --json?"),
        ("try", "required"),
        ("try many a", "many"),
    ],
)
def test_a_wrong_argument_is_one_line(
    line: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_verb(monkeypatch, "echo")
    with pytest.raises(SystemExit) as done:
        main(line.split())
    assert done.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)
    assert captured.err.startswith("mmpt try: ")
    assert hint in captured.err
    assert "mmpt try --help" in captured.err


def run(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    """The program with a verb of SCRIPT."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | options)


@pytest.mark.parametrize(
    ("arguments", "status", "lines"),
    [
        (["loud", "--json"], 0, 1),
        (["bad"], 1, 0),
        (["mistake"], 2, 1),
        (["mistake", "--jsn"], 2, 1),
        (["bug"], 3, None),
    ],
)
def test_the_program_ends_with_its_statuses(
    arguments: list[str], status: int, lines: int | None
) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert status in STATUSES
    assert (done.stdout == "") == (status > 1)
    assert "\033" not in done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == (lines is None)
    if lines is not None:
        assert len(done.stderr.splitlines()) == lines


def test_json_is_strict_and_alone_on_stdout() -> None:
    done = run("loud", "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [1.5, None],
    }
    assert done.stderr == "a library speaks\n"


def test_ctrl_c_ends_with_130_and_one_line() -> None:
    command = [sys.executable, "-c", SCRIPT, "slow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert len(err.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_mistake() -> None:
    for arguments in (["long"], ["long", "--json"], ["long", "--help"]):
        command = [sys.executable, "-c", SCRIPT, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
            _, err = process.communicate()
        assert (process.returncode, err) == (0, b"")


def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_verb(monkeypatch, "mistake")
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert (main(["try"]), main([])) == (2, 0)
    captured = capsys.readouterr()
    assert captured.err.startswith("\033[1;31mmmpt try:\033[0m height")
    assert "\033[1mexamples:\033[0m" in captured.out
    with pytest.raises(SystemExit):
        main(["try", "--help"])
    assert "\033[" in capsys.readouterr().out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert (main(["try"]), main([])) == (2, 0)
            captured = capsys.readouterr()
            assert "\033" not in captured.out + captured.err


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


def test_a_bug_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_verb(monkeypatch, "bug")
    assert main(["try"]) == 3
    *trace, last = capsys.readouterr().err.splitlines()
    assert trace[0].startswith("Traceback")
    assert trace[-1] == "RuntimeError: a bug"
    assert last.startswith("mmpt try: a fault of mmpt ")
    monkeypatch.setenv("MMPT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["try"])
    add_verb(monkeypatch, "mistake")
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
    assert main(["--json", "try", "3", "a", "b", "--loud", "--name", "y"]) == 0
    assert json.loads(capsys.readouterr().out) == want


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
    assert all("% " in line for line in before if line)  # nothing else but progress
