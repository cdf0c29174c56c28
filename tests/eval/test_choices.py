"""Choices among candidates, and probes: right when there is something to know, chance when not."""

import numpy as np
import pytest

from mmpt.data.tokens import EncodedDocument
from mmpt.eval.choices import _groups, judge, measure_choices, share
from mmpt.eval.passes import Passes
from mmpt.eval.probe import classify, lone_stream, measure_probe
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Segment
from mmpt.train.recipe import fit_model
from mmpt.vocab import Modality

NEWLINE = np.array([10])


def documents(count, *, seed=0):
    """A text and a picture each, of ideas of their own."""
    rng = np.random.default_rng(seed)
    return [
        EncodedDocument(
            f"d-{n}",
            f"idea-{n}",
            "any",
            [
                Segment(Modality.TEXT, rng.integers(0, 200, rng.integers(2, 9))),
                Segment(Modality.IMAGE, rng.integers(0, 64, (3, 3))),
            ],
        )
        for n in range(count)
    ]


@pytest.fixture
def model(vocabulary):
    config = ModelConfig(
        vocab_size=1, width=16, num_layers=2, num_heads=2, num_kv_heads=1, expert_hidden=16
    )
    return Decoder.from_config(fit_model(config, vocabulary))


def test_what_ignores_the_condition_is_right_once_in_k():
    rng = np.random.default_rng(0)
    own = np.repeat(rng.normal(0, 50, (500, 1, 4)), 4, axis=1)  # of a target, whatever is given
    assert judge(own)["right_plain"] == 0.25
    noisy = judge(own + rng.normal(0, 1e-3, own.shape))
    assert noisy["low"] < 0.25 < noisy["high"]
    assert noisy["trials"] == 2000


def test_a_small_effect_is_seen_beside_the_likelihood_that_targets_have_anyway():
    rng = np.random.default_rng(0)
    own = np.repeat(rng.normal(0, 50, (50, 1, 4)), 4, axis=1)
    scores = own + rng.normal(0, 0.5, own.shape) + 2 * np.eye(4)
    found = judge(scores)
    assert found["right"] > 0.8
    assert found["low"] > 0.25
    assert found["right_plain"] < 0.4  # which long and short targets hide


def test_the_interval_of_a_share_covers_it_about_95_times_in_100():
    rng = np.random.default_rng(0)
    draws = [share(int(n), 60, chance=0.25) for n in rng.binomial(60, 0.3, 500)]
    hits = sum(each["low"] <= 0.3 <= each["high"] for each in draws)
    assert 460 <= hits <= 490
    assert share(8, 8, chance=0.25)["low"] < 0.7  # few trials prove little


def test_groups_have_each_idea_and_each_text_once():
    found = documents(9)
    twins = [EncodedDocument(f"{d.key}-b", d.base, "any", d.segments) for d in found]
    same = EncodedDocument("other", "idea-other", "any", found[0].segments)
    fixed = EncodedDocument("page", "idea-page", "fixed", documents(1, seed=5)[0].segments)
    groups = list(_groups([*found, *twins, same, fixed], Modality.IMAGE, 4))
    assert [len(group) for group in groups] == [4, 4]
    bases = [document.base for group in groups for document in group]
    assert len(set(bases)) == 8
    assert "idea-page" not in bases
    assert not {"idea-0", "idea-other"} <= set(bases)  # one text


def test_an_untrained_model_chooses_by_chance_both_ways(model, vocabulary):
    passes = Passes(model, vocabulary)
    found = measure_choices(
        passes, vocabulary, Modality.IMAGE, [documents(24)], NEWLINE, candidates=4
    )
    assert list(found) == ["text given image", "image given text"]
    for each in found.values():
        assert each["trials"] == 24
        assert each["low"] < 0.25 < each["high"]
    few = measure_choices(passes, vocabulary, Modality.IMAGE, [documents(3)], NEWLINE, candidates=4)
    assert few == {}


def test_a_probe_reads_off_what_the_states_hold_and_nothing_else(model, vocabulary):
    rng = np.random.default_rng(0)

    def labelled(count, *, told):
        pairs = []
        for n in range(count):
            label = "ab"[n % 2]
            low = 32 * (n % 2 if told else rng.integers(2))
            codes = rng.integers(low, low + 32, (3, 3))
            segments = [Segment(Modality.TEXT, np.arange(3)), Segment(Modality.IMAGE, codes)]
            pairs.append((EncodedDocument(f"{n}", f"{n}", "any", segments), label))
        return pairs

    passes = Passes(model, vocabulary)
    for told in (True, False):
        train, heldout = labelled(200, told=told), labelled(100, told=told)
        found = measure_probe(passes, vocabulary, Modality.IMAGE, train, heldout, NEWLINE)
        assert found["chance"] == 0.5
        assert found["classes"] == 2
        assert (found["low"] > 0.65) if told else (found["low"] < 0.5 < found["high"])
    one = [(document, "a") for document, _ in labelled(8, told=True)]
    assert measure_probe(passes, vocabulary, Modality.IMAGE, one, one, NEWLINE) == {}


def test_a_probe_sees_its_medium_alone(vocabulary):
    [document] = documents(1)
    stream = lone_stream(document, vocabulary, Modality.IMAGE, NEWLINE)
    assert stream.loss_weight.sum() == 9
    assert (stream.ids >= vocabulary.num_text).all()


def test_a_ridge_is_not_fooled_by_more_directions_than_documents():
    rng = np.random.default_rng(0)
    means = rng.normal(0, 0.6, (3, 200))
    labels, truth = rng.integers(0, 3, 40), rng.integers(0, 3, 300)
    states = rng.normal(0, 1, (40, 200)) + means[labels]
    test = rng.normal(0, 1, (300, 200)) + means[truth]
    assert (classify(states, labels, test) == truth).mean() > 0.8
    noise = classify(rng.normal(0, 1, (40, 200)), labels, test)
    assert (noise == truth).mean() < 0.45
