"""Small media as bytes, and the verb with what it wrote read back."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from mmpt.data.formats import import_documents
from mmpt.data.shards import Document, Quarantine, read_documents
from mmpt.parts import Image, Text


@dataclass(frozen=True)
class Imported:
    """What the verb returned, the documents in the shards, and the lines of the quarantine."""

    result: dict[str, Any]
    documents: list[Document]
    lines: list[dict[str, Any]]

    def brief(self) -> list[list[str | int]]:
        """Texts as they are, pictures as the red of their first pixel, else the kind."""
        return [[_brief(part) for part in document.parts] for document in self.documents]


def _brief(part: Any) -> str | int:
    if isinstance(part, Text):
        return part.text
    return int(part.pixels[0, 0, 0]) if isinstance(part, Image) else type(part).__name__


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Imported]:
    def run(kind: Any, *paths: Path, **options: Any) -> Imported:
        result = import_documents(kind, list(paths), out=tmp_path / "out", **options)
        bad = Quarantine()
        documents = list(read_documents(result["shards"], bad))
        assert bad.count == 0, bad.lines
        assert result["read"] == result["written"] + result["left_out"]
        assert result["written"] == len(documents)
        lines = []
        if result["quarantine"]:
            text = Path(result["quarantine"]).read_text()
            lines = [json.loads(line) for line in text.splitlines()]
        assert len(lines) == result["left_out"] + result["parts_left_out"]
        # train stands before held-out: back into the order of the keys
        return Imported(result, sorted(documents, key=lambda d: d.key), lines)

    return run


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    def picture(red: int, kind: str = "png", side: int = 16) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (side, side), (red, 0, 0)).save(buffer, kind)
        return buffer.getvalue()

    return picture


@pytest.fixture(scope="session")
def sound() -> Callable[..., bytes]:
    def sound(seconds: float = 1.0, rate: int = 8000, kind: str = "WAV") -> bytes:
        time = np.arange(round(seconds * rate)) / rate
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.5 * np.sin(2 * np.pi * 440 * time), rate, format=kind)
        return buffer.getvalue()

    return sound
