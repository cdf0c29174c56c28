"""Evaluation during training: it changes nothing, survives resumes, is the same on any ranks."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmpt.config import UserError, load_recipe, to_toml
from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, open_shards
from mmpt.eval.config import EvaluateConfig, ProbeConfig
from mmpt.eval.during import source_of
from mmpt.eval.heldout import evaluate_modality
from mmpt.model.transformer import Decoder
from mmpt.stream import Segment
from mmpt.train.checkpoint import latest
from mmpt.train.optim import OptimConfig
from mmpt.train.pretrain import pretrainer, train
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Modality

PROBES = {"even": ProbeConfig(medium="image", pattern=r"-(\d)$")}


@pytest.fixture
def watched(tmp_path, config, vocabulary, write_shard):
    """Ten steps on two sources, evaluated every four."""
    rng = np.random.default_rng(0)

    def documents(name, count):
        made = []
        for n in range(count):
            segments = [
                Segment(Modality.TEXT, rng.integers(0, 200, rng.integers(2, 9))),
                Segment(Modality.IMAGE, rng.integers(0, 64, (3, 3))),
                Segment(Modality.SPEECH, rng.integers(0, 512, 9)),
            ]
            kept = segments[: 2 + n % 2]
            made.append(EncodedDocument(f"{name}-{n}-{n % 2}", f"{name}-{n}", "any", kept))
        return made

    for name in ("birds", "boats"):
        split = {"train": [], "heldout": []}
        for document in documents(name, 160):
            split["heldout" if is_heldout(document.base) else "train"].append(document)
        for side, found in split.items():
            write_shard(tmp_path / "tokens" / f"{name}-{side}-0000.tokens.tar", found)
    vocabulary.save(tmp_path / "tokens" / "vocabulary.json")
    sources = {
        name: SourceConfig(shards=(str(tmp_path / "tokens" / f"{name}-train-*.tokens.tar"),))
        for name in ("birds", "boats")
    }
    return TrainRecipe(
        vocabulary=str(tmp_path / "tokens" / "vocabulary.json"),
        data=DataConfig(sources=sources, rows=4, streams=2, length=64, buffer=8),
        steps=10,
        model=config,
        optim=OptimConfig(lr=1e-2, warmup=2),
        checkpoint_every=3,
        seed=3,
        evaluate=EvaluateConfig(every=4, documents=12, probes=PROBES),
    )


@pytest.fixture
def run(vocabulary):
    def go(recipe, folder, **options):
        return train(recipe, folder, vocabulary=vocabulary, progress=False, **options)

    return go


def lines(folder, name="evaluations.jsonl"):
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    for row in rows:
        for key in ("seconds", "laps", "step_seconds", "speed"):
            row.pop(key, None)
    return rows


def weights(folder):
    return Decoder.load(latest(folder / "checkpoints")).state_dict()


def test_a_watched_run_ends_bit_equal_to_one_that_is_not(tmp_path, watched, run, tensors_equal):
    run(watched, tmp_path / "watched")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(replace(watched, evaluate=EvaluateConfig()), tmp_path / "alone")
    assert torch.equal(torch.get_rng_state(), before)
    assert tensors_equal(weights(tmp_path / "watched"), weights(tmp_path / "alone"))
    assert lines(tmp_path / "watched", "metrics.jsonl") == lines(
        tmp_path / "alone", "metrics.jsonl"
    )
    assert not (tmp_path / "alone" / "evaluations.jsonl").exists()
    rows = lines(tmp_path / "watched")
    assert [row["step"] for row in rows] == [4, 8, 10]
    last = rows[-1]
    assert set(last["loss"]) == {"text", "image", "speech"}
    assert set(last["sources"]) == {"birds", "boats"}
    assert set(last["choices"]) >= {"text given image", "speech given text"}
    assert last["probes"]["even"]["classes"] == 2
    for medium, each in last["loss"].items():
        parts = [source[medium] for source in last["sources"].values()]
        assert each["ids"] == sum(part["ids"] for part in parts)
        total = sum(part["nats"] * part["ids"] for part in parts)
        assert each["nats"] == pytest.approx(total / each["ids"], abs=1e-4)


def test_a_resumed_run_has_the_lines_of_one_that_was_not_stopped(tmp_path, watched, run):
    run(watched, tmp_path / "whole")

    def stop(metrics):
        if metrics["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "stopped"
    run(watched, folder, on_step=stop)
    path = folder / "evaluations.jsonl"
    late = json.dumps({"step": 8, "tokens": 1}) + '\n{"step": 9, "to'  # of a run that was killed
    path.write_text(path.read_text() + late)
    more = replace(watched, evaluate=replace(watched.evaluate, candidates=2))  # may change
    assert len(lines(tmp_path / "whole")) == 3
    run(watched, folder)
    assert lines(folder) == lines(tmp_path / "whole")
    assert run(more, folder).finished


def test_it_finds_what_mmpt_eval_finds(tmp_path, watched, vocabulary):
    recipe = replace(watched, evaluate=EvaluateConfig(every=1, documents=1000))
    trainer = pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary)
    trainer.step()
    found = trainer.watching.evaluation.measure(trainer.model)
    assert trainer.model.training
    shards = open_shards([tmp_path / "tokens"], vocabulary)
    documents = [document for shard in shards for document in shard]
    sides = [[d for d in documents if is_heldout(d.base) == side] for side in (False, True)]
    for medium in (Modality.TEXT, Modality.IMAGE, Modality.SPEECH):
        row = evaluate_modality(trainer.model, vocabulary, medium, *sides, shards[0].separator)
        ours = found["loss"][medium.name.lower()]
        assert ours["ids"] == row["tokens"]
        assert ours["nats"] == pytest.approx(row["nats"], abs=1e-4)
    trainer.close()


def test_ranks_that_share_the_work_find_what_one_finds(tmp_path, watched, run_script):
    recipe = tmp_path / "recipe.toml"
    model = replace(watched.model, num_kv_heads=2)  # which two ranks can divide
    recipe.write_text(to_toml(replace(watched, model=model)))
    run_script("evaluated.py", recipe, tmp_path)

    def read(name, rank):
        return json.loads((tmp_path / f"{name}-{rank}.json").read_text())

    one = read("one", 0)
    for name in ("two", "experts", "tensors"):
        for rank in (0, 1):
            other = read(name, rank)
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
            for medium, row in one["found"]["loss"].items():
                assert other["found"]["loss"][medium] == pytest.approx(row, abs=1e-4)
            for kind in ("choices", "probes"):
                assert other["found"][kind].keys() == one["found"][kind].keys()
            assert other["found"] == read(name, 0)["found"]


def test_mistakes_are_told_before_training(tmp_path, watched, vocabulary):
    def refused(words, **changes):
        recipe = replace(watched, evaluate=replace(watched.evaluate, **changes))
        with pytest.raises(UserError, match=words) as caught:
            pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary)
        assert "\n" not in str(caught.value)

    refused("no token shard matches", shards=("nowhere/*.tokens.tar",))
    refused("no held-out document", shards=(str(tmp_path / "tokens/*-train-*.tokens.tar"),))
    for values, words in (
        ({"every": -1}, "at least 0"),
        ({"candidates": 1}, "at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            EvaluateConfig(**values)
    for values, words in (
        ({"medium": "smell", "pattern": "(a)"}, "choose from"),
        ({"medium": "text", "pattern": "("}, "no pattern"),
        ({"medium": "text", "pattern": "a"}, "no group"),
    ):
        with pytest.raises(UserError, match=words):
            ProbeConfig(**values)


def test_a_recipe_with_probes_is_read_back(tmp_path, watched):
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(watched))
    assert load_recipe(TrainRecipe, path) == watched


def test_shards_of_one_source_are_known_by_their_names(tmp_path):
    for name, source in (
        ("emoji-heldout-0000", "emoji"),
        ("emoji-train-0012", "emoji"),
        ("a-b-0001", "a-b"),
        ("pages", "pages"),
    ):
        assert source_of(tmp_path / f"{name}.tokens.tar") == source


def test_the_model_learns_what_it_is_watched_for(tmp_path, watched, run):
    seldom = replace(watched.evaluate, every=10)
    recipe = replace(watched, steps=20, optim=OptimConfig(lr=2e-2, warmup=2), evaluate=seldom)
    run(recipe, tmp_path / "run")
    rows = lines(tmp_path / "run")
    assert rows[-1]["loss"]["text"]["nats"] < rows[0]["loss"]["text"]["nats"]
    assert all(math.isfinite(row["loss"]["image"]["nats"]) for row in rows)
