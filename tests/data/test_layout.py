from dataclasses import replace

import numpy as np
import pytest

from mmpt.data.layout import to_conditioned_stream, to_stream
from mmpt.data.tokens import EncodedDocument
from mmpt.stream import Segment, Stream, parse
from mmpt.vocab import Modality, Vocabulary

NEWLINE = np.array([10])


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


TALK = EncodedDocument(
    "t",
    "t",
    "fixed",
    [
        segment(Modality.IMAGE, 2, 2),
        segment(Modality.TEXT, 2, start=20),
        segment(Modality.TEXT, 3, start=30),
        segment(Modality.TEXT, 1, start=40),
        segment(Modality.IMAGE, 1, 2),
    ],
    ("user", "user", "assistant", "user", "assistant"),
)


def shown(stream: Stream, vocabulary: Vocabulary) -> list[tuple[str, float]]:
    """Structure ids, text and codes as words, each with its weight."""

    def name(token: int, medium: int) -> str:
        if medium != Modality.TEXT:
            return "code"
        place = token - vocabulary.num_text
        return str(token) if place < 0 else (*vocabulary.structure, *["size"] * 2000)[place]

    tokens = zip(stream.ids.tolist(), stream.modality.tolist(), stream.loss_weight, strict=True)
    return [(name(token, medium), float(weight)) for token, medium, weight in tokens]


@pytest.mark.parametrize("masked", [False, True])
def test_turns_begin_by_their_ids_and_prompts_can_weigh_nothing(vocabulary, masked):
    stream = to_stream(
        TALK,
        vocabulary,
        np.random.default_rng(0),
        separator=NEWLINE,
        condition_drop=0.0,
        masked_prompts=masked,
    )
    found = shown(stream, vocabulary)
    picture = ["<boi>", "size", "size", *["code"] * 4, "<eoi>"]
    turns = [
        (["<user>", *picture, "20", "21", "<assistant>"], 0.0),
        # that the user speaks again is how the answer ends
        (["30", "31", "32", "<user>"], 1.0),
        (["40", "<assistant>"], 0.0),
        (["<boi>", "size", "size", "code", "code", "<eoi>", "<eod>"], 1.0),
    ]
    expected = [("<bod>", 0.0)]
    for words, weight in turns:
        expected += [(word, weight if masked else 1.0) for word in words]
    assert found == expected


def test_a_dropped_prompt_leaves_null_and_one_answer(vocabulary):
    kept = set()
    for seed in range(20):
        stream = to_stream(
            TALK,
            vocabulary,
            np.random.default_rng(seed),
            separator=NEWLINE,
            condition_drop=1.0,
            masked_prompts=True,
        )
        assert stream.loss_weight.tolist() == [0, 0] + [1] * (len(stream) - 2)
        kept.add(tuple(word for word, _ in shown(stream, vocabulary)))
    text = "<bod>", "<null>", "30", "31", "32", "<eod>"
    picture = "<bod>", "<null>", "<boi>", "size", "size", "code", "code", "<eoi>", "<eod>"
    assert kept == {text, picture}


def test_an_unanswered_prompt_has_no_answer_to_keep_and_nothing_to_learn(vocabulary):
    question = replace(TALK, segments=TALK.segments[:2], roles=TALK.roles[:2])
    stream = to_stream(
        question,
        vocabulary,
        np.random.default_rng(0),
        separator=NEWLINE,
        condition_drop=1.0,
        masked_prompts=True,
    )
    assert vocabulary.structure_id("<user>") in stream.ids
    assert not stream.loss_weight.any()
