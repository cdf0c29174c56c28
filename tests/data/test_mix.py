import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.loader import DataConfig, Loader
from mmpt.data.mix import Mixer, Schedule, SourceConfig, Stage

WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.0}


def read(mixer, lengths, number):
    """Read documents of these mean lengths; the ids of each source."""
    rng = np.random.default_rng(0)
    before = {name: cursor.tokens for name, cursor in mixer.cursors.items()}
    for length in rng.lognormal(0, 0.7, number):
        name = mixer.choose()
        mixer.was_read(name, 1 + int(length * lengths[name == "a"]))
    return {name: cursor.tokens - before[name] for name, cursor in mixer.cursors.items()}


def shares(tokens):
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


def test_the_mix_is_the_asked_one_in_tokens_whatever_the_lengths():
    mixer = Mixer(list(WEIGHTS))
    mixer.set_weights(WEIGHTS)
    tokens = read(mixer, (50, 400), 20_000)  # documents of a are eight times longer
    assert shares(tokens)["a"] == pytest.approx(0.25, rel=1e-3)
    assert tokens["c"] == 0
    assert mixer.choose() in ("a", "b")


def test_new_weights_hold_from_where_they_were_set():
    mixer = Mixer(list(WEIGHTS))
    for weights in (WEIGHTS, {"a": 2.0, "b": 1.0, "c": 1.0}, {"a": 0.0, "b": 1.0, "c": 9.0}):
        mixer.set_weights(weights)
        got = shares(read(mixer, (50, 50), 5000))
        whole = sum(weights.values())
        assert got == pytest.approx({n: w / whole for n, w in weights.items()}, abs=2e-3)


def test_a_mixer_goes_on_from_its_state():
    one, other = Mixer(list(WEIGHTS)), Mixer(list(WEIGHTS))
    for weights in (WEIGHTS, {"a": 0.3, "b": 0.1, "c": 0.7}):
        one.set_weights(weights)
        read(one, (31, 77), 100)
    other.load(json.loads(json.dumps(one.state())))
    assert read(one, (31, 77), 100) == read(other, (31, 77), 100)
    assert one.state() == other.state()


def test_nothing_is_chosen_where_all_weights_are_0():
    assert Mixer(["a"]).choose() is None


def test_a_schedule_is_a_function_of_the_row():
    stages = (
        Stage(start=0.8, weights={"c": 2.0}),  # of the run
        Stage(start=10_240, ramp=10_240, unit="tokens", weights={"a": 3.0, "b": 1.0}),
        Stage(start=50, unit="rows", weights={"b": 0.5}),
    )
    schedule = Schedule(WEIGHTS, stages, length=512, total_rows=100)
    assert schedule.at(0) == schedule.at(20) == WEIGHTS
    assert schedule.at(30) == {"a": 2.0, "b": 2.0, "c": 0.0}
    assert schedule.at(40) == schedule.at(49) == {"a": 3.0, "b": 1.0, "c": 0.0}
    assert schedule.at(50) == schedule.at(79) == {"a": 3.0, "b": 0.5, "c": 0.0}
    assert schedule.at(80) == schedule.at(10**9) == {"a": 3.0, "b": 0.5, "c": 2.0}


def test_a_schedule_that_cannot_be_is_refused():
    upsample = Stage(start=0.8, weights={"a": 2.0})
    with pytest.raises(UserError, match="give total_rows"):
        Schedule(WEIGHTS, [upsample], length=512)
    with pytest.raises(UserError, match="names x; the sources are a, b, c"):
        Schedule(WEIGHTS, [Stage(start=0, weights={"x": 1.0})], length=512, total_rows=1)
    nothing = Stage(start=5, unit="rows", weights={"a": 0.0, "b": 0.0})
    with pytest.raises(UserError, match="no source with a weight above 0 at row 5"):
        Schedule(WEIGHTS, [nothing], length=512)
    with pytest.raises(UserError, match="never reached"):
        Stage(start=80.0, weights={"a": 1.0})
    with pytest.raises(UserError, match="at least 0"):
        Stage(start=0.5, weights={"a": -1.0})
    with pytest.raises(UserError, match="max_epochs = 0"):
        SourceConfig(shards=("x",), max_epochs=0.0)


@pytest.fixture
def config(tmp_path, make_documents, write_shard):
    """Three sources of short rows."""
    for seed, name in enumerate("abc"):
        write_shard(tmp_path / f"{name}.tokens.tar", make_documents(30, seed=seed, name=name))

    def make(**options):
        sources = {
            name: SourceConfig(shards=(str(tmp_path / f"{name}.tokens.tar"),), weight=weight)
            for name, weight in WEIGHTS.items()
        }
        return DataConfig(sources=sources, rows=8, length=64, buffer=8, **options)

    return make


def test_10_000_rows_follow_the_mix_and_so_does_every_stream(config, vocabulary):
    loader = Loader(replace(config(streams=4), rows=400, length=16), vocabulary, seed=0)
    list(islice(loader, 25))
    assert loader.report.rows == 10_000
    assert loader.mix()["a"] == pytest.approx(0.25, rel=0.01)
    for state in loader.state_dict()["streams"].values():
        tokens = {name: cursor[1] for name, cursor in state["cursors"].items()}
        assert abs(tokens["a"] - 0.25 * sum(tokens.values())) < 300  # less than a document


def test_a_source_can_come_in_at_the_end_of_a_run(config, vocabulary):
    late = Stage(start=0.8, weights={"c": 4.0})
    loader = Loader(config(schedule=(late,)), vocabulary, seed=0, total_rows=800)
    list(islice(loader, 80))
    before = loader.state_dict()["streams"]["0"]["cursors"]
    assert before["c"][1] == 0
    list(islice(loader, 20))
    after = loader.state_dict()["streams"]["0"]["cursors"]
    tokens = {name: after[name][1] - before[name][1] for name in WEIGHTS}
    assert shares(tokens)["c"] == pytest.approx(0.5, abs=0.03)
    assert loader.weights() == {"a": 1.0, "b": 3.0, "c": 4.0}
