import hashlib
import json
import os
import runpy
import signal
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.loader import DataConfig, Loader, SourceConfig, Stage, merge_states
from mmpt.data.logical import LogicalStream
from mmpt.data.mix import Schedule
from mmpt.data.order import permute
from mmpt.data.shards import is_heldout
from mmpt.stream import parse
from mmpt.vocab import Modality

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


def order(size, key):
    """Where a permutation sends 0, 1, ..."""
    return permute(np.arange(size, dtype=np.uint64), size, np.full(size, key, dtype=np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_the_order_is_a_permutation(size):
    assert sorted(order(size, 99)) == list(range(size))


def test_orders_of_different_keys_look_unrelated():
    first = permute(np.zeros(5000, dtype=np.uint64), 10, np.arange(5000, dtype=np.uint64))
    counts = np.bincount(first.astype(int), minlength=10)
    assert abs(counts - 500).max() < 110  # 5 standard deviations
    assert (order(1000, 1) == order(1000, 2)).sum() < 12


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
    state = loader.state_dict()["streams"]["0"]
    stream = LogicalStream(0, config, loader.sources, Schedule({"a": 0.0, "c": 0.0}, length=128))
    stream.load(state)
    residue = 0
    while pieces := stream.row(100, None):  # nothing is read where all weights are 0
        residue += sum(piece.size for piece in pieces)
    assert out + residue == sum(tokens for _, tokens, *_ in state["cursors"].values())


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


class OneByOne:
    """A source that gives its documents singly, and notes which it was asked for."""

    def __init__(self, source):
        self.name, self.fingerprint, self._source = source.name, source.fingerprint, source
        self.asked = []

    def __len__(self):
        return len(self._source)

    def stream(self, number):
        self.asked.append(number)
        return self._source.stream(number)


@pytest.mark.parametrize("packing", ["best-fit", "concatenation"])
def test_a_source_of_single_documents_gives_the_same_rows_and_is_not_read_ahead(
    config, vocabulary, packing
):
    config = replace(config, packing=packing)
    blocks, single = (Loader(config, vocabulary, seed=5) for _ in range(2))
    single.sources = {name: OneByOne(source) for name, source in single.sources.items()}
    assert_equal(list(islice(single, 30)), list(islice(blocks, 30)))
    assert single.state_dict() == blocks.state_dict()
    for name, source in single.sources.items():
        assert source.asked == list(range(single.state_dict()["streams"]["0"]["cursors"][name][0]))


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


def test_the_order_of_one_stream_is_the_one_of_format_1(config, vocabulary):
    digest = hashlib.sha256()
    for rows in islice(Loader(config, vocabulary, seed=5), 60):
        for name in FIELDS:
            digest.update(getattr(rows, name).numpy().tobytes())
    assert digest.hexdigest()[:16] == "556c3688f4aaaa5b"


def test_a_state_of_format_1_is_read(config, vocabulary):
    loader = Loader(config, vocabulary, seed=5)
    list(islice(loader, 30))
    state = loader.state_dict()
    [stream] = state["streams"].values()
    sizes = {name: len(source) for name, source in loader.sources.items()}
    cursors = {}
    for name, (read, tokens, *_) in stream["cursors"].items():
        epoch, place = divmod(read, sizes[name])
        cursors[name] = {"epoch": epoch, "place": place, "tokens": tokens}
    residue = []
    for source, read, piece in stream["residue"]:
        name = list(sizes)[source]
        residue.append([name, *divmod(read, sizes[name]), piece])
    for key in ("streams", "packing", "quotas"):
        del state["settings"][key]
    report = {name: value for name, value in stream["report"].items() if name != "over_quota"}
    old = {"format_version": 1, "settings": state["settings"]}
    old |= {"cursors": cursors, "residue": residue, "report": report}
    other = Loader(config, vocabulary, seed=5)
    other.load_state_dict(json.loads(json.dumps(old)))
    assert_equal(list(islice(other, 30)), list(islice(loader, 30)))
    assert other.state_dict() == loader.state_dict()
    with pytest.raises(UserError, match="format 3; this mmpt reads 2"):
        other.load_state_dict(old | {"format_version": 3})


def dealt(loaders, total):
    """Batches of several ranks put together: rank r has the rows r, r + W, ..."""
    for together in zip(*(islice(loader, total) for loader in loaders), strict=True):
        yield [row_bytes(part, row) for row in range(len(together[0].ids)) for part in together]


def row_bytes(rows, row):
    spans = rows.spans[rows.spans[:, 0] == row, 1:]
    parts = [*(getattr(rows, name)[row] for name in FIELDS[:5]), spans]
    return b"".join(part.numpy().tobytes() for part in parts)


def ranks_of(config, vocabulary, num, state=None):
    loaders = [
        Loader(config, vocabulary, seed=5, rank=rank, num_ranks=num, total_rows=800)
        for rank in range(num)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return loaders


@pytest.fixture
def elastic(config):
    """The same sources for 1, 2, 3, 4, 6 or 12 ranks."""
    ramp = Stage(start=0.1, ramp=0.5, weights={"c": 6.0})
    return replace(config, streams=12, rows=24, schedule=(ramp,), quotas={"image": 40})


def test_ranks_share_the_rows_of_one_and_go_on_from_each_others_states(elastic, vocabulary):
    whole = list(dealt(ranks_of(elastic, vocabulary, 1), 16))
    rows, state = [], None
    for num, steps in ((1, 3), (4, 1), (2, 5), (3, 2), (12, 1), (6, 4)):
        loaders = ranks_of(elastic, vocabulary, num, state)
        rows += dealt(loaders, steps)
        state = merge_states([json.loads(json.dumps(each.state_dict())) for each in loaders])
    assert rows == whole
    assert state == (last := ranks_of(elastic, vocabulary, 1, state)[0]).state_dict()
    assert last.report.rows == 16 * 24


def test_streams_read_every_document_of_an_epoch_once(elastic, vocabulary):
    loader = Loader(replace(elastic, schedule=()), vocabulary, seed=0)
    next(loader)
    for name, source in loader.sources.items():
        read = [
            number + 12 * place
            for number in range(12)
            for place in range(loader.state_dict()["streams"][str(number)]["cursors"][name][0])
        ]
        assert len(set(read)) == len(read)
        assert set(range(len(source))) <= set(read)


@pytest.mark.parametrize("num", [1, 3])
def test_workers_give_the_same_rows_and_states(elastic, vocabulary, num):
    ours = Loader(replace(elastic, workers=num), vocabulary, seed=5, total_rows=800)
    theirs = Loader(elastic, vocabulary, seed=5, total_rows=800)
    for _ in range(2):
        assert_equal(list(islice(ours, 2)), list(islice(theirs, 2)))
        assert ours.state_dict() == theirs.state_dict()
    ours.close()


def test_a_dead_worker_is_replaced(config, vocabulary, caplog):
    whole = list(islice(Loader(config, vocabulary, seed=5), 30))
    loader = Loader(replace(config, workers=1), vocabulary, seed=5)
    rows = list(islice(loader, 2))
    os.kill(loader._readers[0].process.pid, signal.SIGKILL)
    rows += islice(loader, 28)
    assert_equal(rows, whole)
    assert "a data worker died (exit code -9)" in caplog.text
    loader.close()


def test_killed_at_random_points_it_goes_on_with_other_ranks_and_workers(tmp_path):
    script = runpy.run_path(str(Path(__file__).parent / "kill_and_resume.py"))
    plans = [(2, 0), (1, 1), (4, 0), (1, 2), (3, 0)]
    results = list(script["kill_and_resume"](tmp_path, plans))
    assert [wrong for _, wrong in results] == [0] * 5
    assert results[-1][0] > 100


def test_a_number_of_ranks_that_does_not_divide_the_streams_is_refused(elastic, vocabulary):
    with pytest.raises(UserError, match="streams = 12 is no multiple of the 5 ranks"):
        Loader(elastic, vocabulary, seed=0, num_ranks=5)
    with pytest.raises(UserError, match="rows = 24 is no multiple"):
        replace(elastic, streams=5)


def test_states_of_other_ranks_are_merged_first(elastic, vocabulary):
    one, two = ranks_of(elastic, vocabulary, 2)
    next(one)
    with pytest.raises(UserError, match="lacks stream 1; merge the states of all ranks"):
        two.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match="differ in rows: 0 and 24"):
        merge_states([one.state_dict(), two.state_dict()])


@pytest.mark.parametrize("read", [10_000, 10_000_000])
def test_time_to_resume_does_not_grow_with_what_was_read(config, vocabulary, read):
    loader = Loader(config, vocabulary, seed=5)
    next(loader)
    state = loader.state_dict()
    stream = state["streams"]["0"]
    for cursor in stream["cursors"].values():
        cursor[:3] = [read, 400 * read, 400.0 * read]
    stream["since"] = 800 * read
    stream["residue"] = [[source, read - place, 0] for place in range(1, 8) for source in (0, 1)]
    other = Loader(config, vocabulary, seed=5)
    begun = time.process_time()
    other.load_state_dict(state)
    assert next(other).ids.shape == (2, 128)
    assert time.process_time() - begun < 0.2
    assert len(json.dumps(other.state_dict())) < 3000


def test_set_weights_holds_from_the_next_row_and_after_a_resume(elastic, vocabulary):
    whole = Loader(elastic, vocabulary, seed=5, total_rows=800)
    list(islice(whole, 2))
    whole.set_weights({"a": 0.0})
    before = whole.state_dict()
    rows = list(islice(whole, 6))
    after = whole.state_dict()
    resumed = Loader(replace(elastic, workers=1), vocabulary, seed=5, total_rows=800)
    resumed.load_state_dict(json.loads(json.dumps(before)))
    assert resumed.weights()["a"] == 0
    assert_equal(list(islice(resumed, 6)), rows)
    for loader in (whole, resumed):
        loader.set_weights({"a": 5.0})  # what the worker read ahead is forgotten
    assert_equal([next(resumed)], [next(whole)])
    resumed.close()
    reads = [
        [state["streams"][str(n)]["cursors"]["a"][0] for n in range(12)]
        for state in (before, after)
    ]
    assert reads[0] == reads[1]
    with pytest.raises(UserError, match="set_weights names d; the sources are a, c"):
        whole.set_weights({"d": 1.0})
    with pytest.raises(UserError, match="one of them above 0"):
        whole.set_weights({"a": 0.0, "c": 0.0})


@pytest.mark.parametrize(("streams", "workers"), [(1, 0), (4, 0), (4, 3)])
def test_the_rows_end_when_every_source_was_read_as_often_as_it_may_be(
    config, vocabulary, streams, workers
):
    epochs = {"a": 2.0, "c": 0.5}
    sources = {
        name: replace(source, max_epochs=epochs[name]) for name, source in config.sources.items()
    }
    config = replace(config, sources=sources, streams=streams, rows=4, workers=workers)
    loader = Loader(config, vocabulary, seed=0)
    rows = list(loader)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()
    number = {name: len(source) for name, source in loader.sources.items()}
    assert {
        name: sum(state["cursors"][name][0] for state in loader.state_dict()["streams"].values())
        for name in epochs
    } == {"a": 2 * number["a"], "c": -(-number["c"] // 2)}
    read = sum(
        cursor[1]
        for state in loader.state_dict()["streams"].values()
        for cursor in state["cursors"].values()
    )
    assert sum(int((each.document >= 0).sum()) for each in rows) == read  # nothing is left over
    assert (rows[-1].loss_weight[rows[-1].document < 0] == 0).all()
    again = Loader(replace(config, workers=0), vocabulary, seed=0)
    again.load_state_dict(loader.state_dict())
    assert list(again) == []


def test_every_kind_of_packing_resumes(config, vocabulary):
    for packing in ("first-fit", "concatenation", "none"):
        kind = replace(config, packing=packing)
        whole = list(islice(Loader(kind, vocabulary, seed=5), 20))
        assert_equal(stopped_every(3, 20, kind, vocabulary), whole)


def test_rows_move_to_a_device_as_they_are(config, vocabulary):
    rows = next(Loader(config, vocabulary, seed=0))
    assert_equal([rows.to("cpu")], [rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_come_back_from_a_gpu_as_they_were(config, vocabulary):
    rows = next(Loader(config, vocabulary, seed=0))
    moved = rows.to("cuda")
    assert moved.ids.is_cuda
    assert_equal([moved.to("cpu")], [rows])
