"""Documents laid out many at once are what `to_stream` makes of each."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator, Philox

from mmpt.config import UserError
from mmpt.data.draws import MOST, draw, draw_many, philox
from mmpt.data.order import PART, ShardSource
from mmpt.data.pack import stream_of
from mmpt.data.tokens import EncodedDocument, ShardWriter, TokenShard
from mmpt.stream import Segment, Stream
from mmpt.vocab import ROLES, Modality, Vocabulary


def vocabulary_of(*, visual: int, speech: int) -> Vocabulary:
    """With so many codebooks for each medium, of different sizes."""
    pictures = [(f"v{n}", 60 + 200 * n, {"image": "i", "video": "v"}, None) for n in range(visual)]
    sounds = [(f"s{n}", 500 - 100 * n, {"speech": "s"}, None) for n in range(speech)]
    return Vocabulary.build(num_text=300, text_fingerprint="t", codebooks=[*pictures, *sounds])


def segment_of(rng: np.random.Generator, vocabulary: Vocabulary, modality: Modality) -> Segment:
    """Random codes, with sides that are whole frames."""
    if modality == Modality.TEXT:
        return Segment(modality, rng.integers(0, 300, rng.integers(1, 30)))
    sizes = [each.size for each in vocabulary.ranges_of(modality)]
    sides = {Modality.IMAGE: (3, 4), Modality.VIDEO: (2, 3, 2), Modality.SPEECH: (90,)}[modality]
    *outer, last = (int(rng.integers(1, side + 1)) for side in sides)
    codes = np.stack([rng.integers(0, size, (*outer, last)) for size in sizes], axis=-1)
    return Segment(modality, codes.reshape(*outer, -1))


def documents_of(rng: np.random.Generator, vocabulary: Vocabulary) -> Iterator[EncodedDocument]:
    """Of no segment up to more than are permuted at once; text often follows text."""
    for number in range(120):
        most = 4 if number % 6 else 2 * MOST
        media = rng.choice(4, rng.integers(0, most), p=(0.55, 0.15, 0.15, 0.15))
        segments = [segment_of(rng, vocabulary, Modality(medium)) for medium in media]
        key, order = f"{number}", "any" if number % 3 else "fixed"
        talks = order == "fixed" and number % 2
        roles = tuple(rng.choice(ROLES, len(segments)).tolist()) if talks else ()
        yield EncodedDocument(key, key, order, segments, roles)


def write(path: Path, documents: list[EncodedDocument], vocabulary: Vocabulary, **options) -> None:
    with ShardWriter(path, vocabulary, **options) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()


def assert_equal(ours: Stream, theirs: Stream) -> None:
    for name in ("ids", "modality", "loss_weight"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other), name
    assert ours.spans == theirs.spans


@pytest.mark.parametrize("most", [1000, PART])
@pytest.mark.parametrize(("visual", "speech"), [(1, 1), (2, 3)])
@pytest.mark.parametrize(("drop", "masked"), [(0.0, True), (0.4, True), (0.4, False)])
def test_a_block_is_its_documents_one_by_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    visual: int,
    speech: int,
    drop: float,
    masked: bool,
) -> None:
    monkeypatch.setattr("mmpt.data.order.PART", most)
    vocabulary, rng = vocabulary_of(visual=visual, speech=speech), np.random.default_rng(visual)
    for name, separator in (("a", [10]), ("b", []), ("c", [7, 8, 9])):
        documents = list(documents_of(rng, vocabulary))
        path = tmp_path / f"{name}.tokens.tar"
        write(path, documents, vocabulary, separator=separator, documents_per_block=50)
    shards = [TokenShard(path) for path in sorted(tmp_path.glob("*.tar"))]
    source = ShardSource(
        "s", shards, vocabulary, seed=3, condition_drop=drop, masked_prompts=masked
    )
    for numbers in (range(0, 700, 2), range(5), [699, 3, 3, 10**9, 10**12]):
        parts = list(source.streams(np.array(numbers)))
        assert sum(map(len, parts)) == len(numbers)
        assert all(len(part.tokens) <= most or len(part) == 1 for part in parts)
        references = iter(numbers)
        for piece in (
            p for part in parts for p in part.pieces(list(islice(references, len(part))))
        ):
            assert_equal(stream_of(piece), expected := source.stream(piece.reference))
            assert list(piece.counts) == np.bincount(expected.modality, minlength=4).tolist()


def test_codes_outside_of_a_codebook_are_refused(tmp_path: Path, vocabulary: Vocabulary) -> None:
    wide = Vocabulary.build(
        num_text=400,
        text_fingerprint="text-1",
        codebooks=[("visual", 64, {"image": "image-1", "video": "video-1"}, None)],
    )
    text = Segment(Modality.TEXT, np.array([5, 399]))
    write(tmp_path / "a.tokens.tar", [EncodedDocument("b", "b", "any", [text])], wide)
    shard = TokenShard(tmp_path / "a.tokens.tar")
    source = ShardSource("s", [shard], vocabulary, seed=0, condition_drop=0.0)
    for read in (lambda: list(source.streams(np.array([0]))), lambda: source.stream(0)):
        with pytest.raises(UserError, match=r"text codes must be in \[0, 300\)"):
            read()


def test_codes_of_shards_that_are_stored_in_other_types_come_together(tmp_path: Path) -> None:
    small, large = (
        Vocabulary.build(num_text=num_text, text_fingerprint="t", codebooks=[])
        for num_text in (200, 70_000)
    )
    for name, vocabulary in (("a", small), ("b", large)):
        codes = np.arange(190, vocabulary.num_text, 997)
        document = EncodedDocument(name, name, "any", [Segment(Modality.TEXT, codes)])
        write(tmp_path / f"{name}.tokens.tar", [document] * 3, vocabulary)
    shards = [TokenShard(path) for path in sorted(tmp_path.glob("*.tar"))]
    source = ShardSource("s", shards, large, seed=0, condition_drop=0.0)
    [streams] = source.streams(np.arange(len(source)))
    for piece in streams.pieces(range(len(source))):
        assert_equal(stream_of(piece), source.stream(piece.reference))


def test_philox_counts_as_numpys(rng_keys: np.ndarray) -> None:
    for key, words in zip(rng_keys[:20], philox(rng_keys, 3), strict=False):
        assert np.array_equal(Philox(key=key).random_raw(12), words)


def test_many_draws_are_those_of_generators(rng_keys: np.ndarray) -> None:
    rng, number = np.random.default_rng(0), len(rng_keys)
    segments, free = rng.integers(0, MOST + 3, number), rng.random(number) < 0.7
    candidates = np.where(free, segments, np.minimum(segments, 2))
    orders, kept = draw_many(rng_keys, segments, candidates, free, 0.5)
    for key, alone, number, most, loose in zip(
        rng_keys, kept, segments, candidates, free, strict=True
    ):
        order, expected = draw(Generator(Philox(key=key)), number, most, loose, 0.5)
        assert (orders[:number] == order).all()
        assert alone == (-1 if expected is None else expected)
        orders = orders[number:]
    assert not orders.size


@pytest.fixture
def rng_keys() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 1 << 64, (1000, 2), dtype=np.uint64)


def test_a_damaged_table_of_segments_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_documents: Callable, write_shard: Callable
) -> None:
    from mmpt.data import token_writer

    whole = token_writer._block_arrays
    for column, value in ((1, 4), (2, -1), (2, 10**6), (3, 1), (5, -1), (0, 50), (0, -1)):

        def damaged(documents, vocabulary, column=column, value=value):
            arrays = whole(documents, vocabulary)
            arrays["spans"][-1, column] = value
            return arrays

        monkeypatch.setattr(token_writer, "_block_arrays", damaged)
        path = write_shard(tmp_path / "a.tokens.tar", make_documents(20))
        with pytest.raises(UserError, match="a table of segments does not fit its codes"):
            list(TokenShard(path))
    for roles in (np.zeros(3, np.uint8), np.full(200, 3, np.uint8), np.zeros(200)):

        def with_roles(documents, vocabulary, roles=roles):
            arrays = whole(documents, vocabulary)
            return arrays | {"roles": roles[: len(arrays["spans"])]}

        monkeypatch.setattr(token_writer, "_block_arrays", with_roles)
        path = write_shard(tmp_path / "a.tokens.tar", make_documents(20))
        with pytest.raises(UserError, match="a table of segments does not fit its codes"):
            list(TokenShard(path))
