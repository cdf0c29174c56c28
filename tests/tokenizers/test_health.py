"""The health gate: it counts what was used, stops a collapse, and leaves healthy runs alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmpt.config import UserError
from mmpt.parts import Image, Video
from mmpt.tokenizers.health import BadSteps, CodebookHealth, HealthConfig, Unhealthy, measure
from mmpt.tokenizers.objectives import ImageObjective
from mmpt.tokenizers.processes import Processes
from mmpt.tokenizers.quantize import QuantizerConfig, build_quantizer
from mmpt.tokenizers.train import train

SIMVQ = ["image.quantizer.kind=simvq", "image.quantizer.codebook_size=256"]
SIMVQ += ["image.quantizer.width=8"]


class Two(nn.Module):
    """A codec of a plain quantiser and a residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = build_quantizer(QuantizerConfig(levels=(4, 4)))
        self.residual = build_quantizer(QuantizerConfig(levels=(3, 3), num_codebooks=2))


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity"),
    [
        ([5, 5, 5, 5], 1.0, 4.0),
        ([20, 0, 0, 0], 0.25, 1.0),
        ([10, 10, 0, 0], 0.5, 2.0),
        ([1, 1] + [0] * 98, 1.0, 2.0),  # two vectors use all that they can
        ([10_000, 10_000, 3, 0], 0.5, None),  # three of 20,003 are strays
    ],
)
def test_usage_is_the_share_of_codes_that_could_have_been_used(
    counts: list[int], usage: float, perplexity: float | None
) -> None:
    found = measure(torch.tensor(counts))
    assert found.usage == usage
    assert found.size == len(counts)
    if perplexity is not None:
        assert found.perplexity == pytest.approx(perplexity)


def test_every_outermost_quantiser_is_heard_and_the_worst_codebook_counts() -> None:
    codec = Two()
    health = CodebookHealth(codec, HealthConfig(window=2, min_usage=0.0), first_step=1)
    assert len(health.counts) == 16 + 9 + 9
    rows, latents = [], torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) * 3
    for step in range(4):
        with health.listening():
            plain = codec.plain(latents)
            residual = codec.residual(torch.zeros(1, 2))
        rows.append(health.update(Processes("cpu"), step))
    codes = [plain.codes.unique(), *(c.unique() for c in residual.codes.unbind(-1))]
    assert rows[0]["used"] == sum(map(len, codes))
    # the first step is the warm-up; the window of steps 1 and 2 is known from step 2 on
    assert [row["usage"] for row in rows] == [None, None, 0.5, 0.5]
    assert rows[-1]["perplexity"] == 1.0
    with health.listening():
        codec.plain(latents)
    codec.plain(latents[:1] * 0)  # nobody listens
    assert health.update(Processes("cpu"), 4)["used"] == len(codes[0])


def test_a_quantiser_without_a_codebook_is_not_judged() -> None:
    quantizer = build_quantizer(QuantizerConfig(kind="ema", codebook_size=64, width=2))
    health = CodebookHealth(quantizer, HealthConfig(window=1, min_usage=0.9), first_step=0)
    latents = torch.ones(100, 2)
    with health.listening():
        quantizer(latents)
    assert health.update(Processes("cpu"), 0) == {"used": 0, "usage": None, "perplexity": None}
    quantizer.initialise(torch.randn(200, 2), torch.Generator().manual_seed(0))
    with health.listening():
        quantizer(latents)
    with pytest.raises(Unhealthy, match="only 1 of 64 codes were in use"):
        health.update(Processes("cpu"), 1)


def test_bad_steps_are_counted_and_a_row_of_them_ends_it() -> None:
    bad = BadSteps(HealthConfig(max_bad_steps=3))
    found = [bad.update(i, 0.1, good=good) for i, good in enumerate([False, False, True, False])]
    assert found == [1, 2, 2, 3]
    bad.update(4, 0.1, good=False)
    with pytest.raises(Unhealthy, match=r"in 3 steps in a row, up to step 6; lower lr \(now 0.1\)"):
        bad.update(5, 0.1, good=False)


@pytest.mark.parametrize("change", [{"window": 0}, {"min_usage": 1.0}, {"max_bad_steps": 0}])
def test_a_gate_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="health: window"):
        HealthConfig(**change)


def test_a_codebook_that_collapses_ends_the_training_in_one_line(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image], "log_every = 1")
    # an absurd learning rate drives all latents to one side
    absurd = ["lr=3.0", "steps=60", "health.window=10", "health.min_usage=0.05"]
    overrides = [*tiny["image"], *SIMVQ, "precision=fp32", *absurd]
    with pytest.raises(UserError, match="the codebook has collapsed") as caught:
        train(recipe, overrides, out=tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert "of 256 codes were in use" in message
    assert "lower lr" in message
    assert f"{tmp_path / 'out' / 'checkpoint.safetensors'} stays" in message
    assert (tmp_path / "out" / "checkpoint.safetensors").is_file()
    rows = [json.loads(row) for row in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert rows[0]["used"] > 12 > rows[-1]["used"]


def test_a_healthy_training_is_not_stopped(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image], "log_every = 1")
    gate = ["lr=1e-3", "steps=24", "health.window=10", "health.min_usage=0.05"]
    train(recipe, [*tiny["image"], *SIMVQ, "precision=fp32", *gate], out=tmp_path / "out")
    rows = [json.loads(row) for row in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert rows[-1]["usage"] > 0.05
    assert rows[-1]["bad_steps"] == 0


def test_a_step_that_is_not_finite_changes_nothing_and_many_end_the_training(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path, "image", shards[Image], "log_every = 1")
    real = ImageObjective.loss

    def poisoned(
        self: ImageObjective, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, float]]:
        if step in (1, 3, 4):
            batch = {"pixels": batch["pixels"] * math.nan}
        return real(self, batch, step)

    monkeypatch.setattr(ImageObjective, "loss", poisoned)
    train(recipe, tiny["image"], out=tmp_path / "out")
    rows = [json.loads(row) for row in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 2, 3, 3]
    assert [row["loss"] is None for row in rows] == [False, True, False, True, True, False]
    with pytest.raises(UserError, match="not finite in 2 steps in a row, up to step 5") as caught:
        train(recipe, [*tiny["image"], "health.max_bad_steps=2"], out=tmp_path / "stopped")
    assert "stays" in str(caught.value)


def test_a_clip_is_judged_by_all_of_its_codes(
    shards: dict[type, Path],
    tiny: dict[str, list[str]],
    tmp_path: Path,
    write_recipe: Callable[..., Path],
) -> None:
    recipe = write_recipe(tmp_path, "video", shards[Video], "log_every = 1")
    train(recipe, [*tiny["video"], "steps=2"], out=tmp_path / "out")
    row = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert 1 <= row["used"] <= 2 * 2 * 64  # clips x latents x codes
    assert np.isfinite(row["loss"])
