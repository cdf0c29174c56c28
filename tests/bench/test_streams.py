"""`mmpt bench streams`: memory is read while sound streams, and a codec that hoards is noticed."""

import mmap
from pathlib import Path

import pytest
from torch import Tensor

from mmpt.bench import streams
from mmpt.config import UserError
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.speech import SpeechCodec, SpeechCodecConfig
from mmpt.tokenizers.speech_stream import SpeechStream


@pytest.fixture
def codec() -> SpeechCodec:
    quantizer = QuantizerConfig(kind="ema", codebook_size=16, width=4)
    config = SpeechCodecConfig(quantizer=quantizer, width=8, num_layers=1, num_heads=1)
    return SpeechCodec(config).eval()


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch, codec: SpeechCodec) -> None:
    monkeypatch.setattr(streams, "MINUTES", (1, 2))
    monkeypatch.setattr(streams, "shipped", lambda kind: codec)


def test_memory_and_speed_of_a_stream() -> None:
    memory, speed = streams.streams("cpu")
    assert memory.case == ", memory at minute 2"
    assert memory.unit == "MiB"
    assert memory.ratio == pytest.approx(memory.peer / memory.ours)
    assert memory.ratio > 1
    assert speed.ours == speed.ratio > 1


def test_a_stream_that_keeps_what_it_heard_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = [], SpeechStream.push

    def hoard(stream: SpeechStream, samples: Tensor) -> Tensor:
        pages = mmap.mmap(-1, 2**20)  # of the system's: what was freed before is not used again
        pages.write(b"x" * 2**20)
        kept.append(pages)
        return real(stream, samples)

    monkeypatch.setattr(SpeechStream, "push", hoard)
    memory, _ = streams.streams("cpu")
    assert memory.ratio < 1


def test_without_proc_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streams, "STATM", tmp_path / "none")
    with pytest.raises(UserError, match="only Linux"):
        streams.streams("cpu")
