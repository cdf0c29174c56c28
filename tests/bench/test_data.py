"""`mmpt bench data`: peers give what ours gives, a wrong one is noticed, limits are measured."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mmpt.bench import data, harness, readers
from mmpt.data.index import build_index, save_index
from mmpt.data.loader import Loader
from mmpt.data.shards import write_samples


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "REPETITIONS", 1)
    monkeypatch.setattr(harness, "PARTS", 1)
    monkeypatch.setattr(data, "PAIRS", 6)
    monkeypatch.setattr(data, "DOCUMENTS", 80)
    monkeypatch.setattr(data, "BATCHES", 2)
    monkeypatch.setattr(data, "STEPS", 1)
    monkeypatch.setattr(data, "WARM_STEPS", 0)
    small = ("model.width=48", "model.num_layers=1", "data.rows=1", "data.length=128")
    monkeypatch.setattr(data, "MODEL", (*data.MODEL, *small))


@pytest.fixture
def pairs(tmp_path: Path) -> list[Path]:
    return data.write_pairs(tmp_path / "pairs")


@pytest.mark.parametrize("decode", [False, True])
def test_peers_give_the_same_samples(pairs: list[Path], decode: bool) -> None:
    rows = list(data._sample_rows("case", pairs, decode=decode))
    assert rows[0].peer_name.startswith("webdataset ")
    assert len(rows) == 1 + readers.has_energon()
    assert all(row.ours > 0 and row.unit == "samples/s" for row in rows)


def test_a_peer_that_gives_others_is_not_timed(pairs: list[Path]) -> None:
    ours, theirs = (data._contents(readers.our_reader([shard], decode=True)) for shard in pairs)
    with pytest.raises(RuntimeError, match="case: 0 of 3 are equal; it has 3"):
        data._show_equal("case", ours, theirs)


def test_a_sample_that_is_not_counted_is_noticed(pairs: list[Path]) -> None:
    reader = readers.our_reader(pairs, decode=False)
    write_samples(pairs[1], [{"__key__": "one", "txt": b"red"}])
    save_index(build_index(pairs[1]))
    with pytest.raises(RuntimeError, match="4 samples of 6 that are indexed"):
        data._drain(reader.read)


def test_rows_that_lie_ready_are_those_of_the_loader(tmp_path: Path) -> None:
    vocabulary = data.bench_vocabulary()
    config = data.token_config(tmp_path / "tokens", vocabulary)
    ours = list(map(vars, islice(Loader(config, vocabulary, seed=0), 2)))
    theirs = list(islice(readers.map_rows(tmp_path / "rows", ours), 2))
    assert {name: array.dtype for name, array in theirs[0].items()} == readers.ARRAYS
    documents = [
        sorted(each for rows in side for each in readers.documents_of(rows))
        for side in (ours, theirs)
    ]
    assert documents[0] == documents[1]


def test_token_rows_and_limits(tmp_path: Path) -> None:
    vocabulary = data.bench_vocabulary()
    config = data.token_config(tmp_path / "tokens", vocabulary)
    rows = list(data._token_rows(tmp_path, config, vocabulary))
    assert rows[0].peer_name == "numpy memmap of rows"
    assert len(rows) == 1 + readers.has_energon()
    limit, growth = data._resume_rows(config, vocabulary)
    assert limit.unit == "s"
    assert limit.ours == growth.ours < data.MAX_RESUME


def test_waiting_is_a_share_of_a_step(tmp_path: Path) -> None:
    vocabulary = data.bench_vocabulary()
    config = data.token_config(tmp_path / "tokens", vocabulary)
    wait = data._wait_row(tmp_path, config, vocabulary, "cpu")
    assert 0 < wait.ours < 100
    assert wait.ratio == pytest.approx(data.MAX_WAIT / wait.ours)


def test_the_index_of_the_sampler_is_small(tmp_path: Path) -> None:
    shard = Path(shutil.copy(data.sampler_shards()[0], tmp_path))
    save_index(build_index(shard))
    assert 20 < data._index_row([shard]).ours < data.MAX_INDEX


def test_packing_of_a_peer_is_best_fit() -> None:
    samples = [{"tokens": np.zeros(size)} for size in (3, 9, 5, 7, 1)]
    rows = readers._best_fit(samples, 10)
    assert [[len(sample["tokens"]) for sample in row] for row in rows] == [[9, 1], [7, 3], [5]]
