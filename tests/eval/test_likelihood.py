import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.eval.likelihood import (
    bigram,
    paired_interval,
    position_unigram,
    previous_frame,
    token_nats,
    unigram,
)
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, StreamBuilder
from mmpt.vocab import Modality


def _text(vocabulary, codes):
    return StreamBuilder(vocabulary).structure("<bod>").text(codes).structure("<eod>").build()


def _media(vocabulary, modality, codes):
    builder = StreamBuilder(vocabulary).structure("<bod>")
    return builder.media(modality, np.asarray(codes)).structure("<eod>").build()


def _mean(nats, streams, modality):
    chosen = [
        n[1:][(s.modality[1:] == modality) & (n[1:] > 0)]  # structure has none
        for n, s in zip(nats, streams, strict=True)
    ]
    return float(np.concatenate(chosen).mean())


@pytest.fixture
def model(vocabulary):
    config = ModelConfig(
        vocab_size=len(vocabulary), width=16, num_layers=2, num_heads=2, expert_hidden=8
    )
    return Decoder.from_config(config).double()


def test_token_nats_are_minus_log_of_the_full_softmax(vocabulary, model):
    rng = np.random.default_rng(0)
    streams = [_text(vocabulary, rng.integers(0, 300, n)) for n in (5, 9)]
    rows = Rows.pack([streams, streams[:1]], 24, vocabulary.structure_id("<pad>"))
    nats = token_nats(model, rows)
    assert nats.shape == (2, 24)
    assert not nats[:, 0].any()
    assert nats[0, 7] == 0  # the second document begins here
    assert not nats[rows.document < 0].any()
    ids = torch.from_numpy(streams[1].ids)[None]
    scores = model.logits(model(ids, modality=torch.zeros_like(ids))).log_softmax(-1)
    expected = -scores[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(nats[0, 8:18].double(), expected, atol=1e-5, rtol=0)


def test_rows_of_pads_have_no_nats(vocabulary, model):
    rows = Rows.pack([[], []], 6, vocabulary.structure_id("<pad>"))
    assert not token_nats(model, rows).any()


def test_a_unigram_learns_the_entropy_of_its_ids(vocabulary):
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    train, heldout = (
        [_media(vocabulary, Modality.SPEECH, rng.choice(4, 60, p=p)) for _ in range(n)]
        for n in (80, 40)
    )
    nats = unigram(train, heldout, vocabulary, Modality.SPEECH)
    assert _mean(nats, heldout, Modality.SPEECH) == pytest.approx(1.75 * np.log(2), abs=0.05)
    assert not nats[0][heldout[0].modality != Modality.SPEECH].any()


def test_every_baseline_is_a_distribution_and_finite_for_unseen_ids(vocabulary):
    train = [_media(vocabulary, Modality.VIDEO, np.zeros((2, 1, 2), dtype=int))]
    heldout = [_media(vocabulary, Modality.VIDEO, np.full((2, 1, 2), 0)) for _ in range(64)]
    for code, stream in enumerate(heldout):  # the same past, every possible last code
        stream.ids[stream.spans[0].start + 3] += code
    for baseline in (unigram, position_unigram, bigram):
        nats = baseline(train, heldout, vocabulary, Modality.VIDEO)
        total = sum(np.exp(-n[s.spans[0].start + 3]) for n, s in zip(nats, heldout, strict=True))
        assert total == pytest.approx(1)
    nats = previous_frame(train, heldout, vocabulary)
    total = sum(np.exp(-n[s.spans[0].start + 3]) for n, s in zip(nats, heldout, strict=True))
    assert total == pytest.approx(1)


def test_text_baselines_give_all_their_probability_to_text(vocabulary):
    train = [_text(vocabulary, [1, 2, 1, 2]), _text(vocabulary, [3])]
    heldout = [_text(vocabulary, [1, code]) for code in range(vocabulary.num_text)]
    for baseline in (unigram, bigram):
        nats = baseline(train, heldout, vocabulary, Modality.TEXT)
        assert sum(np.exp(-n[2]) for n in nats) == pytest.approx(1)
        assert not any(n[0] or n[3] for n in nats)  # <bod>, <eod>


def test_a_bigram_uses_the_id_before(vocabulary):
    rng = np.random.default_rng(0)
    streams = [_text(vocabulary, (rng.integers(0, 50) + np.arange(40)) % 50) for _ in range(60)]
    args = (streams[:50], streams[50:], vocabulary, Modality.TEXT)
    one, two = (_mean(f(*args), streams[50:], Modality.TEXT) for f in (unigram, bigram))
    assert one > np.log(45)
    assert two < 0.4


def test_a_bigram_of_noise_falls_back_to_the_unigram(vocabulary):
    rng = np.random.default_rng(0)
    streams = [_text(vocabulary, rng.integers(0, 200, 30)) for _ in range(60)]
    args = (streams[:50], streams[50:], vocabulary, Modality.TEXT)
    one, two = (_mean(f(*args), streams[50:], Modality.TEXT) for f in (unigram, bigram))
    assert two < one + 0.05


def test_a_position_unigram_uses_the_place_in_the_grid(vocabulary):
    rng = np.random.default_rng(0)
    places = np.arange(16).reshape(4, 4)
    images = [(places + rng.integers(0, 2, (4, 4))) % 64 for _ in range(60)]
    streams = [_media(vocabulary, Modality.IMAGE, image) for image in images]
    args = (streams[:50], streams[50:], vocabulary, Modality.IMAGE)
    assert _mean(position_unigram(*args), streams[50:], Modality.IMAGE) < 0.8
    assert _mean(unigram(*args), streams[50:], Modality.IMAGE) > 2.5


def test_the_previous_frame_is_copied_as_often_as_training_says(vocabulary):
    rng = np.random.default_rng(0)
    streams = []
    for _ in range(120):
        frames = [rng.integers(0, 64, (3, 3))]
        for _ in range(3):
            fresh = rng.random((3, 3)) < 0.25
            frames.append(np.where(fresh, rng.integers(0, 64, (3, 3)), frames[-1]))
        streams.append(_media(vocabulary, Modality.VIDEO, np.stack(frames)))
    train, heldout = streams[:100], streams[100:]
    nats = previous_frame(train, heldout, vocabulary)
    later = np.concatenate(
        [
            n[s.spans[0].start + 9 : s.spans[0].start + 36]
            for n, s in zip(nats, heldout, strict=True)
        ]
    )
    same = 0.75 + 0.25 / 64
    entropy = -same * np.log(same) - 63 / 256 * np.log(1 / 256)
    assert later.mean() == pytest.approx(entropy, abs=0.15)
    first = np.concatenate([n[s.spans[0].start :][:9] for n, s in zip(nats, heldout, strict=True)])
    assert first.mean() == pytest.approx(np.log(64), abs=0.3)


def test_a_baseline_without_training_ids_is_refused(vocabulary):
    streams = [_text(vocabulary, [1, 2])]
    with pytest.raises(UserError, match="no image ids"):
        unigram(streams, streams, vocabulary, Modality.IMAGE)


def test_the_interval_covers_the_true_difference_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        count = rng.integers(5, 20, 40)
        better = rng.normal(3.0, 1.0, 40) * count
        worse = better + rng.normal(0.5, 0.4, 40) * count
        interval = paired_interval(worse, better, count, generator=rng, num_draws=400)
        assert interval.low <= interval.mean <= interval.high
        hits += interval.low < 0.5 < interval.high
    assert 175 <= hits <= 200


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(UserError, match="0 differences"):
        paired_interval([], [], [], generator=np.random.default_rng(0))
