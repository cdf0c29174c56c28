"""Fixtures that several parts use: a small vocabulary, documents of every medium as codes."""

from collections.abc import Callable

import numpy as np
import pytest

from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.stream import Segment
from mmpt.vocab import Modality, Vocabulary

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
