"""`mmpt encode` is killed with SIGKILL at random moments, and the same command is run again.

    python tests/data/kill_and_encode.py --points 5

Its token shards must equal those that one process wrote undisturbed, byte for byte, and nothing
else may lie in its folder; by two processes and by a local Ray.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHARDS = ("emoji-heldout", "voices-train", "prompts-train", "voices-heldout", "handbook-heldout")
WAYS = {"processes": ("--workers", "2"), "ray": ("--workers", "2", "--ray", "local")}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_and_encode(command: Sequence[str], out: Path, seconds: float) -> tuple[bool, int]:
    """Kill it so many seconds after its first file and run it again.

    Gives whether it was still running, and how many shards were done.
    """
    run = [*command, "--out", str(out)]
    with subprocess.Popen(run, **QUIET) as process:
        while process.poll() is None and not (out.exists() and any(out.iterdir())):
            time.sleep(0.01)
        time.sleep(seconds)
        killed = process.poll() is None
        process.kill()
    done = len(list(out.glob("*.tokens.tar")))
    subprocess.run(run, check=True, **QUIET)
    return killed, done


def main() -> int:
    """Exit status 1 when a shard differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=5, help="how often each way is killed")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sampler = Path(__file__).parents[2] / "data" / "sampler"
    job = [str(sampler / f"{name}-0000.tar") for name in SHARDS]
    command = [sys.executable, "-m", "mmpt", "encode", *job]
    rng, wrong = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        subprocess.run([*command, "--out", str(whole), "--workers", "1"], check=True, **QUIET)
        truth = contents(whole)
        times = [path.stat().st_mtime for path in whole.glob("*.tokens.tar")]
        for point, way in enumerate(options.ways * options.points):
            out, seconds = Path(folder) / f"{way}-{point}", rng.random() * (max(times) - min(times))
            killed, done = kill_and_encode([*command, *WAYS[way]], out, seconds)
            found = contents(out)
            differ = [n for n in {*truth, *found} if truth.get(n) != found.get(n)]
            wrong += len(differ)
            how = f"killed after {seconds:.1f} s" if killed else "ended by itself"
            print(f"{way}: {how}, {done} of {len(job)} shards done; differ: {differ}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
