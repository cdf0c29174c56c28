"""The launch files: their syntax, SLURM's directives, and that signals reach the ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
FILES = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
# stands in for torchrun: it does not know SIGUSR1, and starts one rank that does
LAUNCHER = """#!/usr/bin/env bash
{python} -c '
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(10)
' &
wait $!
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_launch_file_has_no_mistakes(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin"):
        done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
        assert not done.stdout
    if path.suffix == ".sh":
        assert os.access(path, os.X_OK)


def test_the_directives_of_slurm_are_whole():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    found = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", each) for each in found)
    directives = {name: value for name, _, value in (each.partition("=") for each in found)}
    assert directives["--ntasks-per-node"] == "1"  # one torchrun a node
    assert re.fullmatch(
        r"USR1@\d+", directives["--signal"]
    )  # no "B:": to the steps, not the script
    assert directives["--requeue"] == ""  # a flag
    assert directives["--open-mode"] == "append"  # else the log of the first run is lost
    assert re.fullmatch(r"\d+:\d\d:\d\d", directives["--time"])
    first_command = next(number for number, line in enumerate(lines) if line.startswith("set "))
    assert all(
        not line.startswith("#SBATCH") for line in lines[first_command:]
    )  # SLURM stops there


def test_sigusr1_reaches_the_ranks_and_not_the_launcher(tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER.format(python=sys.executable))
    launcher.chmod(0o755)
    node = subprocess.Popen(
        [LAUNCH / "node.sh"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert node.stdout is not None
    assert node.stdout.readline() == "ready\n"
    began = time.monotonic()
    node.send_signal(signal.SIGUSR1)
    assert node.wait(timeout=5) == 7  # what the rank ended with, through the launcher
    assert time.monotonic() - began < 5
