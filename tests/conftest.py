"""Fixtures that several parts use: a small vocabulary, documents as codes, small random codecs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.processor import Processor
from mmpt.stream import Segment
from mmpt.tokenizers.base import Codec, load_codec
from mmpt.tokenizers.image import ImageCodec, ImageCodecConfig
from mmpt.tokenizers.quantize import QuantizerConfig
from mmpt.tokenizers.speech import SpeechCodec, SpeechCodecConfig
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import VideoCodec, VideoCodecConfig
from mmpt.vocab import Modality, Vocabulary

T = TypeVar("T", bound=Codec)
NEWLINE = np.array([10])


def build_vocabulary(image_codec: str = "image-1", *, num_image: int = 64) -> Vocabulary:
    """Text of 300 ids, one visual codebook, one of speech."""
    return Vocabulary.build(
        num_text=300,
        text_fingerprint="text-1",
        codebooks=[
            ("visual", num_image, {"image": image_codec, "video": "video-1"}, None),
            ("speech", 512, {"speech": "speech-1"}, None),
        ],
    )


def build_documents(number: int, *, seed: int = 0, name: str = "doc") -> list[EncodedDocument]:
    """Documents of one to five segments of any medium; text follows a learnable pattern."""
    rng = np.random.default_rng(seed)
    documents = []
    for index in range(number):
        segments = [_segment(rng) for _ in range(rng.integers(1, 6))]
        order = "any" if rng.random() < 0.7 else "fixed"
        documents.append(EncodedDocument(f"{name}-{index}", f"{name}-{index}", order, segments))
    return documents


def _segment(rng: np.random.Generator) -> Segment:
    modality = Modality(rng.integers(0, 4))
    if modality == Modality.TEXT:
        start, length = rng.integers(0, 50), rng.integers(1, 40)
        return Segment(modality, np.arange(start, start + length))
    if modality == Modality.IMAGE:
        return Segment(modality, rng.integers(0, 64, (4, 4)))
    if modality == Modality.VIDEO:
        return Segment(modality, rng.integers(0, 64, (2, 3, 3)))
    return Segment(modality, rng.integers(0, 512, rng.integers(1, 70)))


@pytest.fixture
def vocabulary() -> Vocabulary:
    return build_vocabulary()


@pytest.fixture
def make_vocabulary() -> Callable[..., Vocabulary]:
    return build_vocabulary


@pytest.fixture
def make_documents() -> Callable[..., list[EncodedDocument]]:
    return build_documents


@pytest.fixture
def write_shard(vocabulary) -> Callable:
    """Writes documents as a token shard, in blocks of seven."""

    def write(path, documents, *, vocabulary=vocabulary, per_block=7):
        with ShardWriter(
            path, vocabulary, separator=NEWLINE, documents_per_block=per_block
        ) as writer:
            for document in documents:
                writer.add(document)
            writer.finish()
        return path

    return write


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tiny tensors slow where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# the contract of a codec holds for any weights, so the codecs of tests are random


def _randomise(module: torch.nn.Module) -> None:
    # zero-initialised branches would hide what depends on what
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four saved codecs: text, image, video, speech."""
    folder = tmp_path_factory.mktemp("zoo")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = ImageCodec(ImageCodecConfig(encoder_width=16, decoder_width=16, decoder_blocks=1))
        speech = SpeechCodec(
            SpeechCodecConfig(
                quantizer=QuantizerConfig(kind="ema", codebook_size=64, width=16),
                width=32,
                num_layers=1,
                num_heads=2,
            )
        )
        _randomise(image)
        _randomise(speech)
        speech.quantizer.initialise(torch.randn(500, 16), torch.Generator().manual_seed(0))
        image.save(folder / "image")
        speech.save(folder / "speech")
        video = VideoCodec(VideoCodecConfig(width=16, num_blocks=1), image)
        _randomise(video.temporal)
        video.save(folder / "video")
    text = TextCodec.train_on(["a red apple on a red table"] * 20, num_text=280)
    text.save(folder / "text")
    return folder


@pytest.fixture(scope="session")
def image_codec(zoo: Path) -> ImageCodec:
    return _load(zoo / "image", ImageCodec)


@pytest.fixture(scope="session")
def video_codec(zoo: Path) -> VideoCodec:
    return _load(zoo / "video", VideoCodec)


@pytest.fixture(scope="session")
def speech_codec(zoo: Path) -> SpeechCodec:
    return _load(zoo / "speech", SpeechCodec)


@pytest.fixture(scope="session")
def text_codec(zoo: Path) -> TextCodec:
    return _load(zoo / "text", TextCodec)


@pytest.fixture(scope="session")
def processor(zoo: Path) -> Processor:
    """All four random codecs and their vocabulary."""
    return Processor.load([str(zoo / name) for name in ("text", "image", "video", "speech")])


def _load(folder: Path, kind: type[T]) -> T:
    codec = load_codec(folder)
    assert isinstance(codec, kind)
    return codec
