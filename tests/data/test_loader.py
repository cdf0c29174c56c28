import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.layout import to_conditioned_stream, to_stream
from mmpt.data.loader import DataConfig, Loader, SourceConfig
from mmpt.data.order import permute
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument
from mmpt.stream import Segment, parse
from mmpt.vocab import Modality

NEWLINE = np.array([10])
FIELDS = ("ids", "modality", "document", "position", "loss_weight", "spans")


@pytest.fixture
def config(tmp_path, make_documents, write_shard):
    """Two sources, one of two shards, with documents longer than a row."""
    write_shard(tmp_path / "a-0.tokens.tar", make_documents(25, seed=1, name="a"))
    write_shard(tmp_path / "a-1.tokens.tar", make_documents(18, seed=2, name="b"))
    write_shard(tmp_path / "c-0.tokens.tar", make_documents(31, seed=3, name="c"))
    sources = {
        "a": SourceConfig(shards=(str(tmp_path / "a-*.tar"),), weight=2.0),
        "c": SourceConfig(shards=(str(tmp_path / "c-0.tokens.tar"),)),
    }
    return DataConfig(sources=sources, rows=2, length=128, buffer=16)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in FIELDS:
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def stopped_every(steps, total, config, vocabulary):
    """Rows of a loader that is thrown away and restored after every `steps` batches."""
    rows, state = [], None
    while len(rows) < total:
        loader = Loader(config, vocabulary, seed=5)
        if state is not None:
            loader.load_state_dict(json.loads(state))
        rows += islice(loader, min(steps, total - len(rows)))
        state = json.dumps(loader.state_dict())
    return rows


@pytest.mark.parametrize("steps", [1, 7])
def test_a_resumed_loader_gives_the_rows_of_an_uninterrupted_one(config, vocabulary, steps):
    whole = list(islice(Loader(config, vocabulary, seed=5), 60))
    assert_equal(stopped_every(steps, 60, config, vocabulary), whole)


def test_a_report_survives_a_resume(config, vocabulary):
    loader = Loader(config, vocabulary, seed=5)
    list(islice(loader, 20))
    other = Loader(config, vocabulary, seed=5)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert other.report == loader.report
    assert other.report.fill > 0.85
    assert other.report.cut > 0
    assert sum(other.report.shares().values()) == pytest.approx(1)


def test_seeds_differ_and_repeat(config, vocabulary):
    one, same, other = (next(Loader(config, vocabulary, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.ids, same.ids)
    assert not torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_the_order_is_a_permutation(size):
    assert sorted(permute(place, size, 99) for place in range(size)) == list(range(size))


def test_orders_of_different_keys_look_unrelated():
    first = [permute(0, 10, key) for key in range(5000)]
    counts = np.bincount(first, minlength=10)
    assert abs(counts - 500).max() < 110  # 5 standard deviations
    moved = [permute(place, 1000, 1) == permute(place, 1000, 2) for place in range(1000)]
    assert sum(moved) < 12


def test_an_epoch_has_every_document_once_and_nothing_held_out(config, vocabulary):
    source = Loader(config, vocabulary, seed=0).sources["a"]
    for epoch in range(3):
        numbers = [source.number(epoch, place) for place in range(len(source))]
        keys = {source.read(number)[0].base for number in numbers}
        everything = {document.base for shard in source.shards for document in shard}
        assert len(numbers) == len(source)
        assert keys == {base for base in everything if not is_heldout(base)}
        assert len(keys) < len(everything)


def test_every_id_that_is_read_comes_out_once(config, vocabulary):
    loader = Loader(config, vocabulary, seed=0)
    out = sum(int((rows.document >= 0).sum()) for rows in islice(loader, 50))
    waiting = Loader(config, vocabulary, seed=0)
    waiting.load_state_dict(loader.state_dict())
    residue = 0
    while len(waiting._packer):
        residue += sum(map(len, waiting._packer.row()))
    read = sum(cursor["tokens"] for cursor in loader.state_dict()["cursors"].values())
    assert out + residue == read


def test_sources_are_mixed_by_tokens(config, vocabulary):
    loader = Loader(config, vocabulary, seed=0)
    list(islice(loader, 200))
    assert loader.mix()["a"] == pytest.approx(2 / 3, abs=0.01)
    assert loader.epochs()["c"] > 1


def test_rows_parse_back_into_whole_spans(config, vocabulary):
    config = replace(config, length=400)  # longer than any document
    for rows in islice(Loader(config, vocabulary, seed=0), 20):
        for row, start, length, modality, frames, height, width in rows.spans.tolist():
            ids = rows.ids[row, start : start + length]
            code_range = vocabulary.range_of(Modality(modality))
            assert length == frames * height * width
            assert ((ids >= code_range.start) & (ids < code_range.stop)).all()
            assert (rows.modality[row, start : start + length] == modality).all()
        for row in range(len(rows.ids)):
            list(parse(rows.ids[row][rows.document[row] >= 0].numpy(), vocabulary))


def test_a_state_of_other_settings_is_refused_in_one_line(config, vocabulary):
    state = Loader(config, vocabulary, seed=0).state_dict()
    other = Loader(replace(config, length=64), vocabulary, seed=0)
    with pytest.raises(UserError, match="length = 128, this recipe 64"):
        other.load_state_dict(state)


def test_a_state_of_other_shards_is_refused(
    config, vocabulary, tmp_path, make_documents, write_shard
):
    state = Loader(config, vocabulary, seed=0).state_dict()
    write_shard(tmp_path / "a-2.tokens.tar", make_documents(3))
    with pytest.raises(UserError, match="sources"):
        Loader(config, vocabulary, seed=0).load_state_dict(state)


def test_weights_must_make_sense():
    source = SourceConfig(shards=("x",), weight=-1.0)
    with pytest.raises(UserError, match="weights"):
        DataConfig(sources={"a": source})
    with pytest.raises(UserError, match="weights"):
        DataConfig(sources={})


def segment(modality, *shape, start=0):
    return Segment(modality, np.arange(start, start + int(np.prod(shape))).reshape(shape))


DOCUMENT = EncodedDocument(
    "k",
    "k",
    "any",
    [
        segment(Modality.TEXT, 3),
        segment(Modality.TEXT, 4, start=20),
        segment(Modality.IMAGE, 2, 2),
        segment(Modality.SPEECH, 60),
    ],
)


def names(stream, vocabulary):
    return [segment.modality.name for segment in parse(stream.ids, vocabulary)]


def test_long_speech_becomes_consecutive_spans(vocabulary):
    document = replace(DOCUMENT, order="fixed")
    stream = to_stream(
        document, vocabulary, np.random.default_rng(0), separator=NEWLINE, condition_drop=0.0
    )
    lengths = [span.length for span in stream.spans if span.modality == Modality.SPEECH]
    assert lengths == [26, 26, 8]
    segments = list(parse(stream.ids, vocabulary))
    assert segments[0].codes.tolist() == [0, 1, 2, 10, 20, 21, 22, 23]
    assert np.concatenate([s.codes for s in segments[2:]]).tolist() == list(range(60))


def test_segments_of_any_order_are_permuted_and_those_of_fixed_order_never(vocabulary):
    fixed, free = set(), set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        options = {"separator": NEWLINE, "condition_drop": 0.0}
        free.add(tuple(names(to_stream(DOCUMENT, vocabulary, rng, **options), vocabulary)))
        fixed_document = replace(DOCUMENT, order="fixed")
        fixed.add(tuple(names(to_stream(fixed_document, vocabulary, rng, **options), vocabulary)))
    assert len(fixed) == 1
    assert len(free) > 6


@pytest.mark.parametrize("order", ["any", "fixed"])
def test_a_dropped_condition_leaves_null_and_one_segment(vocabulary, order):
    document, null = replace(DOCUMENT, order=order), vocabulary.structure_id("<null>")
    kinds = set()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        stream = to_stream(document, vocabulary, rng, separator=NEWLINE, condition_drop=1.0)
        assert stream.ids[1] == null
        assert stream.loss_weight[:2].tolist() == [0, 0]
        kinds.add(frozenset(names(stream, vocabulary)))
    media = {frozenset({"IMAGE"}), frozenset({"SPEECH"})}
    assert kinds == (media if order == "fixed" else media | {frozenset({"TEXT"})})


def test_the_share_of_dropped_conditions_is_the_asked_one(vocabulary):
    null = vocabulary.structure_id("<null>")
    rng = np.random.default_rng(0)
    dropped = [
        null in to_stream(DOCUMENT, vocabulary, rng, separator=NEWLINE, condition_drop=0.1).ids
        for _ in range(2000)
    ]
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.02)


def test_a_conditioned_stream_weighs_only_the_targets_codes(vocabulary):
    for target, count in ((Modality.TEXT, 7), (Modality.IMAGE, 4), (Modality.SPEECH, 60)):
        stream = to_conditioned_stream(DOCUMENT, vocabulary, target, separator=NEWLINE)
        weighted = stream.loss_weight > 0
        assert weighted.sum() == count
        assert (stream.modality[weighted] == target).all()
        assert names(stream, vocabulary)[-1] == target.name
        first = int(np.argmax(weighted))
        assert not (stream.modality[:first] == target).any() or target == Modality.TEXT


def test_a_condition_can_come_from_another_document(vocabulary):
    other = EncodedDocument("o", "o", "any", [segment(Modality.TEXT, 9, start=100)])
    right = to_conditioned_stream(DOCUMENT, vocabulary, Modality.IMAGE, separator=NEWLINE)
    wrong = to_conditioned_stream(
        DOCUMENT, vocabulary, Modality.IMAGE, separator=NEWLINE, condition_from=other
    )
    codes = [stream.ids[stream.loss_weight > 0].tolist() for stream in (right, wrong)]
    assert codes[0] == codes[1]
    assert wrong.ids[1:10].tolist() == list(range(100, 109))
