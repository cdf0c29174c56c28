"""Live pipelines: what webdataset gives is mixed, counted, and started anew when a run goes on."""

import json
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.data.loader import DataConfig, Loader, SourceConfig, merge_states
from mmpt.data.pipeline_source import MAX_BAD_IN_A_ROW, to_sample
from mmpt.data.shards import Quarantine, is_heldout, read_documents
from mmpt.data.sources import sampler_shards
from mmpt.processor import Processor, merge_speech
from mmpt.stream import parse
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe, load_run_recipe
from mmpt.vocab import Modality

MODULE = """
import tarfile
import webdataset

SHARD = {shard!r}
def emoji(stream, num_streams):
    pipeline = webdataset.WebDataset(SHARD, shardshuffle=False, nodesplitter=None)
    return pipeline.slice(stream, 24, num_streams)

def words(stream, num_streams):
    for number in range(stream, 60, num_streams):
        text = f"red {{number}} " + "apple " * (number % 7)
        yield {{"__key__": f"w-{{number}}", "__url__": "words", "txt": text}}

def mostly_bad(stream, num_streams):
    yield from words(stream, num_streams)
    yield {{"__key__": "broken", "__url__": "bad.tar", "jpg": b"no picture", "txt": b"a table"}}
    yield {{"__key__": "made", "__url__": "bad.tar", "png": object()}}
    yield ("a", "tuple")

def all_bad(stream, num_streams):
    while True:
        yield {{"__key__": "x", "txt": " "}}

def nothing(stream, num_streams):
    return []

def torn(stream, num_streams):
    yield from words(stream, num_streams)
    raise tarfile.ReadError("unexpected end of data")

number = 3
"""


@pytest.fixture
def folder(tmp_path, zoo, monkeypatch):
    """A token folder's settings and vocabulary, and an importable module `live_data`."""
    processor = Processor.load(
        [str(zoo / name) for name in ("text", "image", "video", "speech")], max_side=16
    )
    processor.save_settings(tmp_path)
    processor.vocabulary.save(tmp_path / "vocabulary.json")
    shard = next(path for path in sampler_shards("train") if "emoji" in path.name)
    (tmp_path / "live_data.py").write_text(MODULE.format(shard=str(shard)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "live_data", raising=False)
    return tmp_path


def data_of(folder, function, **settings: Any):
    source = SourceConfig(
        pipeline=f"live_data:{function}",
        processor=str(folder),
        quarantine=str(folder / "bad.jsonl"),
    )
    settings = {"rows": 2, "length": 96, "buffer": 8} | settings
    return DataConfig(sources={"live": source}, **settings)


def open_loader(folder, function, **settings):
    vocabulary = Processor.from_folder(folder).vocabulary
    return Loader(data_of(folder, function, **settings), vocabulary, seed=3)


def content(segments, separator):
    """Media by themselves and all text ids, whatever the order of segments."""
    segments = merge_speech(list(segments))
    texts = [s.codes for s in segments if s.modality == Modality.TEXT]
    media = sorted((s.modality, s.codes.tolist()) for s in segments if s.modality != Modality.TEXT)
    return media, sorted(set(np.concatenate(texts).tolist()) - set(separator.tolist()))


def test_a_webdataset_pipeline_gives_the_documents_of_its_shard(folder):
    processor = Processor.from_folder(folder)
    settings = {"rows": 1, "length": 600, "condition_drop": 0.0, "packing": "none"}
    loader = open_loader(folder, "emoji", **settings)
    shard = next(path for path in sampler_shards("train") if "emoji" in path.name)
    documents = list(islice(read_documents([shard], Quarantine()), 24))
    expected = [
        content(processor.encode_parts(document.parts), processor.separator)
        for document in documents
        if not is_heldout(document.base)
    ]
    assert all(media for media, _ in expected)
    for each in expected + expected[:2]:  # after the last it begins anew
        rows = next(loader)
        segments = list(parse(rows.ids[rows.document >= 0].numpy(), processor.vocabulary))
        assert content(segments, processor.separator) == each
    counts = loader.summary()["samples"]["live"]
    assert counts["passes"] == 2
    assert counts["used"] == len(expected) + 2
    assert counts["filtered"] == {}
    assert loader.epochs() == {}


def test_bad_samples_are_counted_and_listed(folder, caplog):
    loader = open_loader(folder, "mostly_bad")
    for _ in loader:
        counts = loader.summary()["samples"]["live"]
        if counts["passes"] == 2:
            break
    assert counts["quarantined"] == 3
    heldout = sum(is_heldout(f"w-{number}") for number in range(60))
    assert heldout <= counts["filtered"]["held out"] < 2 * heldout
    assert counts["used"] + heldout >= 60
    lines = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["broken", "made", ""]
    assert [line["why"].partition(":")[0] for line in lines] == [
        "bad image",
        "decoded",
        "no sample",
    ]
    assert lines[0]["shard"] == "bad.tar"
    assert sum("bad sample" in record.message for record in caplog.records) == 3


def test_a_run_that_goes_on_starts_the_pipeline_anew_and_says_so(folder, caplog):
    loader = open_loader(folder, "words", length=40)
    list(islice(loader, 4))
    before = loader.summary()["samples"]["live"]
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["inexact"] == ["live"]
    waiting = len(state["streams"]["0"]["residue"])
    assert waiting > 0

    other = open_loader(folder, "words", length=40)
    other.load_state_dict(state)
    rows = list(islice(other, 6))
    assert all(int((each.document >= 0).sum()) for each in rows)
    after = other.summary()["samples"]["live"]
    assert after["lost"] == waiting
    assert after["passes"] == before["passes"] + 1
    assert after["used"] > before["used"]
    at_first, warning = [record.message for record in caplog.records]
    assert "live: pipelines have no state" in at_first
    assert "live: pipelines cannot go on" in warning
    assert f"{waiting} pieces" in warning
    other.load_state_dict(state)  # and so does one that was elsewhere
    next(other)
    assert other.summary()["samples"]["live"]["lost"] == waiting
    assert caplog.records[-1].message == warning


def test_the_rest_of_a_document_that_is_lost_is_lost_too(folder):
    loader = open_loader(folder, "words", packing="concatenation", length=31)
    list(islice(loader, 3))
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["streams"]["0"]["taken"] > 0
    other = open_loader(folder, "words", packing="concatenation", length=31)
    other.load_state_dict(state)
    first = next(other)
    assert int(first.position[0, 0]) == 0  # a document's beginning, not the middle of a lost one


def test_new_weights_lose_nothing(folder, caplog):
    plain, weighed = (list(_rows(folder, weights)) for weights in (None, {"live": 2.0}))
    for one, other in zip(plain, weighed, strict=True):
        assert torch.equal(one.ids, other.ids)
    assert ["have no state" in record.message for record in caplog.records] == [True, True]


def _rows(folder, weights):
    loader = open_loader(folder, "words")
    yield from islice(loader, 3)
    if weights:
        loader.set_weights(weights)
    yield from islice(loader, 3)
    assert loader.summary()["samples"]["live"]["lost"] == 0


def test_streams_have_iterations_of_their_own(folder):
    vocabulary = Processor.from_folder(folder).vocabulary
    config = data_of(folder, "words", streams=2)
    whole = Loader(config, vocabulary, seed=3)
    rows = list(islice(whole, 3))
    ranks = [Loader(config, vocabulary, seed=3, rank=rank, num_ranks=2) for rank in range(2)]
    for each in rows:
        for rank, loader in enumerate(ranks):
            assert torch.equal(next(loader).ids[0], each.ids[rank])
    assert not torch.equal(rows[0].ids[0], rows[0].ids[1])
    merged = merge_states([loader.state_dict() for loader in ranks])
    assert merged["inexact"] == ["live"]
    assert len(merged["streams"]) == 2


def test_a_worker_reads_it_as_well(folder, caplog):
    begun = open_loader(folder, "words")
    next(begun)
    both = [open_loader(folder, "words", workers=workers) for workers in (0, 1)]
    for loader in both:
        loader.load_state_dict(begun.state_dict())
    plain, ahead = both
    for _ in range(2):
        assert torch.equal(next(ahead).ids, next(plain).ids)
    assert ahead.summary() == plain.summary()
    ahead.close()
    assert ["start anew" in record.message for record in caplog.records] == [False, True, True]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "cannot be imported"),
        ("number", "no module:function"),
        ("nothing", "gave stream 0 of 1 no document"),
        ("all_bad", f"{MAX_BAD_IN_A_ROW} bad samples in a row, the last: empty text"),
        ("torn", "failed with ReadError: unexpected end of data; .*handler"),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_one_line(folder, function, message):
    with pytest.raises(UserError, match=message):
        for _ in islice(open_loader(folder, function), 100):
            pass


def test_a_source_is_shards_or_a_pipeline():
    for settings in ({}, {"shards": ("a",), "pipeline": "b:c"}):
        with pytest.raises(UserError, match="give one of the two"):
            SourceConfig(**settings)
    with pytest.raises(UserError, match="its length is not known"):
        SourceConfig(pipeline="b:c", max_epochs=1.0)


def test_text_and_json_may_be_decoded_and_media_may_not():
    sample = to_sample({"__key__": "a", "__url__": "u", "json": {"text": "b"}, "TXT": "c"})
    assert sample.members == {"json": b'{"text": "b"}', "txt": b"c"}
    assert (sample.key, sample.shard) == ("a", "u")
    with pytest.raises(UserError, match="jpg is a Tensor; leave media as bytes"):
        to_sample({"__key__": "a", "jpg": torch.zeros(1)})
    for none in ({"__key__": "a"}, {"txt": "a"}, "a"):
        with pytest.raises(UserError, match="no sample"):
            to_sample(none)


RECIPE = """
vocabulary = "{folder}/vocabulary.json"
steps = 4

[model]
width = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
expert_hidden = 16

[data]
rows = 2
length = 96
buffer = 4

[data.sources.emoji]
pipeline = "live_data:emoji"
"""


def test_a_recipe_trains_on_a_pipeline_and_goes_on(folder, caplog):
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder))
    recipe, vocabulary = load_run_recipe(TrainRecipe, path)
    begun = pretrainer(recipe, folder / "run", vocabulary=vocabulary)
    begun.step()
    begun.save()
    result = pretrainer(recipe, folder / "run", vocabulary=vocabulary).run(progress=False)
    assert result.finished
    assert result.data["samples"]["emoji"]["passes"] == 2
    assert result.data["samples"]["emoji"]["used"] > 0
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert ["start anew" in message for message in warnings] == [False, True]
