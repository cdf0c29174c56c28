"""A training that was stopped anyhow, anywhere, or shared by processes ends like any other."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import mmpt
from mmpt.config import UserError
from mmpt.parts import Audio, Image, Video
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.train import Training, train

ROOT = Path(mmpt.__file__).resolve().parent.parent
MEDIA = {"image": Image, "video": Video, "speech": Audio}
# every part of a training that has a state: a discriminator, a codebook of moving averages
ALL_LOSSES = ["loss.ssim=0.5", "loss.features=0.1", "loss.l1=0.1"]
ADVERSARY = [
    "loss.discriminator=0.1",
    "loss.discriminator_from=0.4",
    "loss.discriminator_width=8",
]
LEARNED = [
    "image.quantizer.kind=ema",
    "image.quantizer.codebook_size=16",
    "image.quantizer.width=4",
]
CASES = {
    "image": ("image", []),
    "image, all losses": ("image", [*ALL_LOSSES, *ADVERSARY]),
    "image, learned codebook": ("image", LEARNED),
    "video": ("video", ADVERSARY),
    "speech": ("speech", ADVERSARY),
    "speech as it is": ("speech", ["augment=false"]),
}
WRITTEN = ("model.safetensors", "config.json", "train.jsonl", "recipe.toml")


def assert_same_files(ours: Path, theirs: Path) -> None:
    for name in WRITTEN:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert not (ours / "checkpoint.safetensors").exists()


def command(recipe: Path, overrides: list[str], out: Path) -> list[str]:
    return [
        "-m",
        "mmpt",
        "tokenizer",
        "train",
        str(recipe),
        *overrides,
        "--out",
        str(out),
        "--json",
    ]


def start(arguments: list[str], **more: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_resumed_training_ends_bit_equal_to_an_uninterrupted_one(
    case: str,
    killed_at: int,
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    stop_at: Callable[[int], AbstractContextManager[None]],
) -> None:
    # learned codebooks are initialised at step 2, and codes die and are restarted after it
    kind, more = CASES[case]
    recipe = write_recipe(tmp_path, kind, shards[MEDIA[kind]], "log_every = 1")
    overrides = [*tiny[kind], *more]
    whole = train(recipe, overrides, out=tmp_path / "whole")
    with stop_at(killed_at), pytest.raises(KeyboardInterrupt):
        train(recipe, overrides, out=tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint.safetensors").is_file()
    torch.manual_seed(99)  # the state of the caller's randomness does not matter
    resumed = train(recipe, overrides, out=tmp_path / "parts")
    assert resumed["fingerprint"] == whole["fingerprint"]
    assert_same_files(tmp_path / "parts", tmp_path / "whole")
    assert load_codec(tmp_path / "whole").fingerprint == whole["fingerprint"]


@pytest.mark.parametrize("case", ["image, all losses", "video", "speech"])
def test_a_training_killed_at_a_random_step_ends_like_one_that_was_not(
    case: str,
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    kind, more = CASES[case]
    recipe = write_recipe(tmp_path, kind, shards[MEDIA[kind]], "log_every = 1")
    overrides = [*tiny[kind], *more, "steps=40", "precision=fp32"]
    out, killed_after = tmp_path / "parts", int(np.random.default_rng().integers(1, 18))
    logs, process = out / "train.jsonl", start(command(recipe, overrides, out))
    while process.poll() is None:
        if logs.is_file() and len(logs.read_text().splitlines()) >= killed_after:
            process.kill()
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    train(recipe, overrides, out=out)
    train(recipe, overrides, out=tmp_path / "whole")
    assert_same_files(out, tmp_path / "whole")


def test_ctrl_c_ends_the_step_keeps_a_checkpoint_and_the_same_command_goes_on(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image])
    real, before = Training.step, signal.getsignal(signal.SIGINT)

    def interrupted(self: Training, now: int) -> dict[str, Any]:
        if now == 1:
            signal.raise_signal(signal.SIGINT)
        return real(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        stopped = train(recipe, tiny["image"], out=tmp_path / "parts")
    assert (stopped["exit_status"], stopped["finished"], stopped["step"]) == (130, False, 2)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is before
    train(recipe, tiny["image"], out=tmp_path / "parts")
    train(recipe, tiny["image"], out=tmp_path / "whole")
    assert_same_files(tmp_path / "parts", tmp_path / "whole")


def test_how_often_is_written_may_change_when_a_training_goes_on(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    stop_at: Callable[[int], AbstractContextManager[None]],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image])
    with stop_at(4), pytest.raises(KeyboardInterrupt):
        train(recipe, tiny["image"], out=tmp_path / "out")
    free = ["checkpoint_every=1", "samples_every=0", "log_every=2", "device=cpu"]
    train(recipe, [*tiny["image"], *free], out=tmp_path / "out")
    rows = [json.loads(row) for row in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 5]


def test_two_processes_learn_what_one_learns(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image], "log_every = 1")
    overrides = [*tiny["image"], "precision=fp32", "batch=5", *ALL_LOSSES, *ADVERSARY]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as torchrun
    processes = [
        start(command(recipe, overrides, tmp_path / "two"), RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in ("0", "1")
    ]
    train(recipe, overrides, out=tmp_path / "one")
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-2, msg=name)
    rows = [(tmp_path / name / "train.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 6  # one process writes
    for ours, theirs in zip(*(map(json.loads, each) for each in rows), strict=True):
        known = {name: value for name, value in theirs.items() if value is not None}
        assert {name: ours[name] for name in known} == pytest.approx(known, rel=1e-3, abs=1e-5)


def test_a_batch_that_is_smaller_than_the_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmpt.tokenizers.processes import Processes

    processes = Processes("cpu")
    processes.count = 3
    with pytest.raises(UserError, match="a batch of 2 cannot be shared by 3 processes"):
        processes.share_of({"pixels": torch.zeros(2, 1)})
    shares = []
    for rank in range(3):
        processes.rank = rank
        batch, weight = processes.share_of({"pixels": torch.arange(7)})
        shares += [(value, weight / processes.count) for value in batch["pixels"].tolist()]
    assert sorted(value for value, _ in shares) == list(range(7))
    assert sum(weight for _, weight in {(value % 3, weight) for value, weight in shares}) == 1
