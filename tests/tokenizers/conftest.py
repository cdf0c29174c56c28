"""Fixtures that tests of codecs share: documents of random media, shards of them, recipes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpt.data.shards import Document, is_heldout, write_shard
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.tokenizers.train import Training

# the smallest codecs that train
TINY = {
    "image": ["image.encoder_width=8", "image.decoder_width=8", "image.decoder_blocks=1"],
    "video": ["video.width=8", "video.num_blocks=1"],
    "speech": [
        "speech.width=16",
        "speech.num_layers=1",
        "speech.num_heads=2",
        "speech.quantizer.kind=ema",
        "speech.quantizer.codebook_size=8",
        "speech.quantizer.width=16",
    ],
}


def _key(number: int, *, heldout: bool = False) -> str:
    return [k for k in (f"k{i}" for i in range(600)) if is_heldout(k) == heldout][number]


def _part(kind: type, number: int) -> Part:
    rng = np.random.default_rng(number)
    if kind is Image:
        return Image(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    if kind is Video:
        return Video(rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8), 12.0)
    num_samples = int(rng.integers(5000, 16_000))
    return Audio((rng.standard_normal(num_samples) * 0.1).astype(np.float32), 16_000)


def _write_recipe(tmp_path: Path, kind: str, shard: Path, *lines: str) -> Path:
    path = tmp_path / f"{kind}.toml"
    fixed = ["steps = 6", "batch = 2", "warmup = 1", "checkpoint_every = 3"]
    named = [f'kind = "{kind}"', f'shards = ["{shard}"]']
    path.write_text("\n".join([*named, *fixed, *lines]))
    return path


@pytest.fixture
def key() -> Callable[..., str]:
    """The number-th key that is held out, or that is not."""
    return _key


@pytest.fixture
def part() -> Callable[[type, int], Part]:
    """A random part of a medium."""
    return _part


@pytest.fixture
def write_recipe() -> Callable[..., Path]:
    """Writes a recipe of six steps."""
    return _write_recipe


@pytest.fixture
def shards(tmp_path: Path) -> dict[type, Path]:
    """A few training documents of each medium, with a label."""
    paths = {}
    for kind in (Image, Video, Audio):
        documents = [
            Document(_key(i), _key(i), "any", [Text(f"label {i}"), _part(kind, i)])
            for i in range(6)
        ]
        paths[kind] = tmp_path / f"{kind.__name__}.tar"
        write_shard(paths[kind], documents)
    return paths


@pytest.fixture
def tiny(zoo: Path) -> dict[str, list[str]]:
    """Overrides, by kind, that make a codec which trains in a moment."""
    return TINY | {"video": [*TINY["video"], f"base={zoo / 'image'}"]}


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Kills trainings when they begin a step, while the block runs."""

    @contextmanager
    def stopping(step: int) -> Iterator[None]:
        real = Training.step

        def killed(self: Training, now: int) -> dict[str, Any]:
            if now == step:
                raise KeyboardInterrupt
            return real(self, now)

        with monkeypatch.context() as patch:
            patch.setattr(Training, "step", killed)
            yield

    return stopping
