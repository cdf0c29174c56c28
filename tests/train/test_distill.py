import signal
from dataclasses import fields, replace

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import TokenShard
from mmpt.train import distill
from mmpt.train.adapt import adapt
from mmpt.train.distill import with_samples
from mmpt.train.recipe import AdaptRecipe, DistillConfig, RunRecipe
from mmpt.vocab import MEDIA, Modality


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(distill, "PER_SHARD", 5)


@pytest.fixture
def start(tmp_path, model):
    model.save(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def distilling(recipe, start):
    """Eight documents, guided, half of what is read."""
    common = {f.name: getattr(recipe, f.name) for f in fields(RunRecipe)}
    data = replace(recipe.data, length=128)
    config = DistillConfig(documents=8, guidance=2.0, top_p=0.9, batch=3)
    common |= {"data": data, "steps": 3}
    return AdaptRecipe(**common, start=str(start), max_noisy=40, distill=config)


def read(run):
    shards = [TokenShard(path) for path in sorted((run / "distilled").glob("*.tokens.tar"))]
    return shards, [document for shard in shards for document in shard]


def contents(document):
    return [(s.modality, s.codes.shape, s.codes.tobytes()) for s in document.segments]


def test_media_of_training_documents_are_sampled_on_their_conditions(
    tmp_path, distilling, start, vocabulary
):
    mixed = with_samples(distilling, tmp_path / "run", start, vocabulary)
    shards, samples = read(tmp_path / "run")
    assert [len(shard) for shard in shards] == [5, 3]
    originals = {document.key: document for document in TokenShard(tmp_path / "a.tokens.tar")}
    for sample in samples:
        original = originals[sample.key.removesuffix("-distilled")]
        assert not is_heldout(sample.base)
        assert sample.base == original.base
        ours, theirs = (
            {
                m: np.concatenate([s.codes.ravel() for s in d.segments if s.modality == m] or [[]])
                for m in MEDIA
            }
            for d in (sample, original)
        )
        assert all(ours[m].shape == theirs[m].shape for m in MEDIA)
        changed = [m for m in MEDIA if not np.array_equal(ours[m], theirs[m])]
        assert len(changed) == 1  # the other media are its condition
        words = [s.codes for s in original.segments if s.modality == Modality.TEXT]
        kept = [s.codes for s in sample.segments if s.modality == Modality.TEXT]
        if words:
            assert np.concatenate(kept).size == np.concatenate(words).size + len(words) - 1
    assert shards[0].notes["distill.guidance"] == 2.0
    assert len(shards[0].notes["weights"]) == 16
    weights = {name: source.weight for name, source in mixed.data.sources.items()}
    assert weights["distilled"] == weights["a"]


def test_an_interrupted_distillation_is_finished_and_equals_a_whole_one(
    tmp_path, distilling, start, vocabulary
):
    with_samples(distilling, tmp_path / "run", start, vocabulary)
    paths = sorted((tmp_path / "run" / "distilled").glob("*.tokens.tar"))
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    with_samples(distilling, tmp_path / "run", start, vocabulary)
    assert [path.read_bytes() for path in paths] == before


def test_samples_do_not_depend_on_their_batch_but_on_guidance(
    tmp_path, distilling, start, vocabulary
):
    def go(name, **changes):
        recipe = replace(distilling, distill=replace(distilling.distill, **changes))
        with_samples(recipe, tmp_path / name, start, vocabulary)
        return [contents(document) for document in read(tmp_path / name)[1]]

    ours = go("three")
    assert go("one", batch=1) == ours
    assert go("unguided", guidance=1.0) != ours


def test_samples_that_were_made_otherwise_are_refused(tmp_path, distilling, start, vocabulary):
    with_samples(distilling, tmp_path / "run", start, vocabulary)
    hotter = replace(distilling, distill=replace(distilling.distill, temperature=2.0))
    with pytest.raises(UserError, match=r"temperature = 1\.0, now it is 2.0"):
        with_samples(hotter, tmp_path / "run", start, vocabulary)


def test_a_run_that_goes_on_reads_the_same_samples(tmp_path, distilling, vocabulary):
    def go(**options):
        distill = replace(distilling.distill, share=1.0, documents=3)
        recipe = replace(distilling, distill=distill, steps=2)
        return adapt(recipe, tmp_path / "run", vocabulary=vocabulary, progress=False, **options)

    assert not go(on_step=lambda _: signal.raise_signal(signal.SIGINT)).finished
    written = [shard.path.stat().st_mtime_ns for shard in read(tmp_path / "run")[0]]
    result = go()
    assert result.finished
    assert result.data["source_shares"] == {"a": 0.0, "distilled": 1.0}
    assert [shard.path.stat().st_mtime_ns for shard in read(tmp_path / "run")[0]] == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, "0 < share <= 1"),
        ({"documents": -1}, "documents >= 0"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**changes)


def test_documents_that_do_not_fit_are_told_of(tmp_path, distilling, start, vocabulary):
    short = replace(distilling, data=replace(distilling.data, length=4))
    with pytest.raises(UserError, match="no document has media and fits"):
        with_samples(short, tmp_path / "run", start, vocabulary)
