"""Bounds of adapted models: beside an enumerated chain, by piece, and from the command line."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.decode.ar import Prefix
from mmpt.decode.noise import Alphabet
from mmpt.decode.sampling import Sampling
from mmpt.eval.bounds import LEVELS, SHARES, last_time, mixture_nats
from mmpt.eval.denoised import AUTOREGRESSIVE, BOUND, Scorer
from mmpt.eval.elbo import _pieces, _text_places, bound_modality, evaluate_bounds
from mmpt.model.config import ModelConfig, NoiseConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import Segment, StreamBuilder
from mmpt.vocab import Modality, Vocabulary

NEWLINE = np.array([10])
V = 3  # used image codes
STATES = torch.tensor(list(itertools.product(range(V), repeat=2)))


@pytest.fixture(params=[20])
def vocabulary(request) -> Vocabulary:
    """Visual codes of which three are used, and two codebooks of speech; 20 text ids, or others."""
    return Vocabulary.build(
        num_text=request.param,
        text_fingerprint="text",
        codebooks=[
            ("visual", 5, {"image": "image", "video": "video"}, [0, 2, 3]),
            ("speech-0", 6, {"speech": "s"}, None),
            ("speech-1", 4, {"speech": "s"}, [1, 2]),
        ],
    )


@pytest.fixture
def make_model(vocabulary):
    """An adapted model in float64, whose weights are large enough to matter."""

    def make(path: str = "mixture", **changes) -> Decoder:
        sizes = {"width": 12, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
        noise = NoiseConfig(path=path, text_block=changes.pop("text_block", 0))
        config = ModelConfig(vocab_size=len(vocabulary), expert_hidden=8, **(sizes | changes))
        config = replace(config, vocabulary=vocabulary.fingerprint, noise=noise)
        model = Decoder.from_config(config, seed=1).double().eval()
        model.add_noisy_groups(noise=noise)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for each in model.parameters():
                each += 0.3 * torch.randn(each.shape, generator=generator, dtype=torch.float64)
        return model

    return make


def documents(number: int, *, heldout: bool = True) -> list[EncodedDocument]:
    rng, out = np.random.default_rng(0), []
    bases = (f"idea-{n}" for n in itertools.count())
    for base in itertools.islice((b for b in bases if is_heldout(b) == heldout), number):
        speech = np.stack([rng.integers(0, 6, 30), rng.integers(1, 3, 30)], axis=1).reshape(-1)
        segments = [
            Segment(Modality.TEXT, rng.integers(0, 20, rng.integers(2, 9))),
            Segment(Modality.IMAGE, rng.choice([0, 2, 3], (1, 2))),
            Segment(Modality.VIDEO, rng.choice([0, 2, 3], (2, 1, 2))),
            Segment(Modality.SPEECH, speech),
        ]
        out.append(EncodedDocument(base, base, "any", segments))
    return out


def denoised(model, vocabulary, modality, made, *, draws=4):
    alphabet, size = Alphabet.of(model, vocabulary, modality), model.config.noise.text_block
    pieces = [
        piece
        for document in made
        for piece in _pieces(document, vocabulary, modality, NEWLINE, alphabet, draws, size)
    ]
    return pieces, Scorer(model, vocabulary, modality, alphabet)


class Chain:
    """The reversed process of a block of two codes: what a model says in every noisy state."""

    def __init__(self, model: Decoder, vocabulary: Vocabulary, piece, number: int = 0) -> None:
        block = piece.blocks[number]
        self.modality = Modality(int(piece.stream.modality[block.start]))
        self.alphabet, self.clean = Alphabet.of(model, vocabulary, self.modality), block.clean
        self.prefix = Prefix(model, vocabulary, [piece.stream.ids[: block.start]], None, Sampling())

    def log_p(self, noisy: torch.Tensor, time: float = 0.5) -> torch.Tensor:
        """(2, V) of clean codes, given indices (2,)."""
        ids = self.alphabet.shown[noisy][None]
        scores = self.prefix.block_scores(ids, self.modality, self.alphabet.ids_V, time=time)
        return scores[0].log_softmax(-1)


def few_words(number: int) -> EncodedDocument:
    """A picture and `number` text ids, of which there are as many as used image codes."""
    [document] = documents(1)
    words = Segment(Modality.TEXT, np.array([2, 0, 1, 1])[:number])
    return replace(document, segments=[words, document.segments[1]])


BOTH = pytest.mark.parametrize(
    ("modality", "vocabulary"), [(Modality.IMAGE, 20), (Modality.TEXT, V)], indirect=["vocabulary"]
)


@BOTH
def test_the_masked_bound_is_at_least_the_nats_of_the_enumerated_chain(
    make_model, vocabulary, modality
):
    text = modality == Modality.TEXT
    model, document = make_model("masked", text_block=2 * text), documents(1)[0]
    made = few_words(4) if text else document
    [piece], scorer = denoised(model, vocabulary, modality, [made], draws=200)
    assert len(piece.blocks) == 1 + text  # the second one is given the ids of the first
    expected, spread = 0.0, 0.0
    for number in range(len(piece.blocks)):
        chain, orders = Chain(model, vocabulary, piece, number), []
        for first in (0, 1):
            noisy, nats = torch.full((2,), V), 0.0
            for place in (first, 1 - first):
                nats -= float(chain.log_p(noisy)[place, chain.clean[place]])
                noisy[place] = chain.clean[place]
            orders.append(nats)
        exact = -np.log(np.mean(np.exp(-np.array(orders))))
        assert sum(orders) / 2 >= exact
        assert abs(orders[0] - orders[1]) > 0.01
        expected, spread = expected + sum(orders) / 2, spread + abs(orders[0] - orders[1])
    bound = float(scorer.sums([piece]).nats[0, BOUND:AUTOREGRESSIVE, 0].sum())
    assert bound == pytest.approx(expected, abs=0.3 * spread)


@BOTH
def test_the_mixture_bound_is_at_least_the_nats_of_the_enumerated_chain(
    make_model, vocabulary, modality
):
    text = modality == Modality.TEXT
    model, document = make_model(text_block=2 * text), documents(1)[0]
    document = few_words(2) if text else document
    again = [replace(document, key=f"other noise {n}") for n in range(40)]
    pieces, scorer = denoised(model, vocabulary, modality, again, draws=8)
    chain, last, share = Chain(model, vocabulary, pieces[0]), last_time(2), SHARES.index(0.5)
    log_p = torch.stack([chain.log_p(state) for state in STATES])  # the model is not told times
    number = {tuple(s): n for n, s in enumerate(STATES.tolist())}
    ones, num = torch.ones(2, V, dtype=torch.bool), 16
    p, bound = torch.full((9,), 1 / 9, dtype=torch.float64), 0.0
    for step in range(num + 1):
        time = last * (step + 0.5) / num if step < num else last
        low, at = (1 - time) / (1 - time + V * time), torch.full((2,), time).double()
        rates, final = torch.zeros(9, 9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
        for n, noisy in enumerate(STATES):
            tilt = torch.where(torch.arange(V) == noisy[:, None], -0.5 * np.log(low), 0.0)
            q = (log_p[n] + tilt).softmax(-1)
            final[n] = q.gather(1, chain.clean[:, None]).prod()
            for place, code in itertools.product(range(2), range(V)):
                own, new = q[place, noisy[place]], q[place, code]
                to = [code if other == place else int(noisy[other]) for other in range(2)]
                if code != noisy[place]:
                    ratio = own * low + new / low + 1 - own - new
                    rates[n, number[tuple(to)]] = ratio / (V * time)
            chance = ((1 - time) / V + time * (noisy == chain.clean)).prod()
            kind = torch.full((2,), step < num)
            nats = mixture_nats(log_p[n], chain.clean, noisy, at, ones, rates=kind)[:, share].sum()
            bound += float(chance * nats) * (last / num if step < num else 1)
        if step < num:
            rates -= torch.diag(rates.sum(1))
            p = p @ torch.linalg.matrix_exp(rates * last / num)
    exact = -float((p * final).sum().log())
    assert 0.01 < bound - exact < 1.5
    ours = scorer.sums(pieces).nats[:, BOUND:AUTOREGRESSIVE, share].sum(1)
    error = float(ours.std()) / len(ours) ** 0.5
    assert error < 0.2
    assert abs(float(ours.mean()) - bound) < 3 * error


@pytest.mark.parametrize("path", ["mixture", "masked", "metric"])
@pytest.mark.parametrize("modality", [Modality.VIDEO, Modality.SPEECH])
def test_a_batch_equals_singles(make_model, vocabulary, path, modality, monkeypatch):
    model = make_model(path, rope="3d", head_width=12)
    pieces, scorer = denoised(model, vocabulary, modality, documents(3))
    together = scorer.sums(pieces)
    monkeypatch.setattr("mmpt.eval.denoised.NOISY", 40)  # copies of other blocks beside them
    for number, piece in enumerate(pieces):
        for whole, one in zip(together, scorer.sums([piece]), strict=True):
            torch.testing.assert_close(whole[number], one[0], atol=1e-10, rtol=0.0)
    # two frames; two spans of at most 26 frames of speech
    assert [len(piece.blocks) for piece in pieces] == [2] * 3


def test_codes_of_another_codebook_and_unused_ones_are_no_candidates(make_model, vocabulary):
    model = make_model()
    with torch.no_grad():
        model.embedding.zero_()  # all scores are alike
    row = bound_modality(model, vocabulary, Modality.SPEECH, [], documents(3), NEWLINE, draws=1)
    alike = (np.log(6) + np.log(2)) / 2
    assert row["autoregressive"] == {"nats": round(alike, 4), "standard_error": 0.0}
    for level in row["by_time"]:
        assert level["nats"] == round(alike, 4)


def test_a_copy_sees_what_decoding_sees(make_model, vocabulary):
    model = make_model(noisy_rank=2)
    [piece], scorer = denoised(model, vocabulary, Modality.IMAGE, documents(1))
    chain, sums = Chain(model, vocabulary, piece), scorer.sums([piece])
    for level, copy in enumerate(piece.blocks[0].copies[: len(LEVELS)]):
        log_p = chain.log_p(copy.noisy, copy.time)
        nats = -log_p.gather(1, chain.clean[:, None]).sum()
        torch.testing.assert_close(sums.nats[0, level, -1], nats, atol=1e-10, rtol=0.0)
        hits = (log_p.argmax(-1) == chain.clean).double().sum()
        assert sums.hits[0, level] == hits


def test_text_is_cut_as_decoding_cuts_it(vocabulary):
    builder = StreamBuilder(vocabulary).structure("<bod>").text(np.arange(5))
    builder.text(NEWLINE).media(Modality.IMAGE, np.array([[0, 2]]))
    stream = builder.text(np.arange(3)).structure("<eod>").build()
    runs = [stream.ids[place].tolist() for place in _text_places(stream, vocabulary, 4)]
    assert runs == [[0, 1, 2, 3], [4, 10], [0, 1, 2]]
    alone = StreamBuilder(vocabulary).text(np.arange(3)).build()  # a piece of a cut page
    [place] = _text_places(alone, vocabulary, 4)
    assert alone.ids[place].tolist() == [1, 2]


@pytest.mark.parametrize("path", ["mixture", "masked"])
def test_the_price_of_text_in_blocks(make_model, vocabulary, path):
    model, made = make_model(path, text_block=4), documents(4)
    result = evaluate_bounds(model, vocabulary, made, made, NEWLINE, draws=3)["heldout"]
    row = result["text"]
    price, gap = row["price_of_blocks"], row["upper_bound_minus_autoregressive"]
    assert row["codes"] == sum(len(document.segments[0].codes) for document in made)
    assert (price["ids_of_a_block"], price["nats_an_id"]) == (4, gap["nats"])
    share = gap["nats"] / row["autoregressive"]["nats"]
    assert price["percent"] == pytest.approx(100 * share, abs=0.01)
    assert "price_of_blocks" not in result["image"]
    with torch.no_grad():
        model.embedding.zero_()  # all ids are alike: blocks lose nothing
    alike = bound_modality(model, vocabulary, Modality.TEXT, made, made, NEWLINE, draws=3)
    assert alike["autoregressive"]["nats"] == round(np.log(20), 4)
    if path == "masked":
        assert alike["price_of_blocks"]["nats_an_id"] == 0


def test_blocks_of_codes_never_used_are_left_out(make_model, vocabulary):
    made = documents(2)
    made[0].segments[1] = Segment(Modality.IMAGE, np.array([[1, 0]]))
    row = bound_modality(make_model(), vocabulary, Modality.IMAGE, [], made, NEWLINE, draws=2)
    assert (row["codes"], row["blocks_left_out"]) == (2, 1)
    assert row["upper_bound"]["standard_error"] is None  # of one document alone
    row = bound_modality(make_model(), vocabulary, Modality.IMAGE, [], made[:1], NEWLINE, draws=2)
    assert row == {"codes": 0, "blocks_left_out": 1}


def test_a_model_that_was_never_adapted_is_refused(vocabulary):
    config = ModelConfig(vocab_size=len(vocabulary), width=12, num_layers=1, num_heads=2)
    model = Decoder.from_config(config)
    with pytest.raises(UserError, match=r"mmpt adapt[^\n]*$"):
        evaluate_bounds(model, vocabulary, [], documents(1), NEWLINE, draws=1)


@pytest.mark.parametrize("path", ["mixture", "metric"])
def test_bounds_from_the_command_line(make_model, vocabulary, tmp_path: Path, capsys, path):
    tokens, folder = tmp_path / "tokens", tmp_path / "model"
    for heldout in (False, True):
        name = tokens / f"{heldout}.tokens.tar"
        with ShardWriter(name, vocabulary, separator=NEWLINE) as writer:
            for document in documents(3, heldout=heldout):
                if heldout:
                    del document.segments[2]  # a medium that is not held out is left out
                writer.add(document)
            writer.finish()
    vocabulary.save(tokens / "vocabulary.json")
    make_model(path).save(folder)
    arguments = ["eval", str(folder), "--tokens", str(tokens), "--elbo", "--json"]
    assert main([*arguments, "--draws", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["noise"], result["draws"]) == (path, 2)
    assert set(result["heldout"]) == {"image", "speech"}
    for medium, codes in (("image", 6), ("speech", 180)):
        row = result["heldout"][medium]
        assert row["codes"] == codes
        assert [level["time"] for level in row["by_time"]] == list(LEVELS)
        assert row["autoregressive"]["standard_error"] > 0
        assert ("upper_bound" in row) == (path != "metric")
        if path == "mixture":
            assert len(row["shares"]) == 4
            gap = row["upper_bound"]["nats"] - row["autoregressive"]["nats"]
            assert row["upper_bound_minus_autoregressive"]["nats"] == pytest.approx(gap, abs=2e-4)
    assert main([*(each for each in arguments if each != "--elbo"), "--draws", "2"]) == 2
    assert "--elbo" in capsys.readouterr().err.strip().splitlines()[-1]
    assert main([*arguments, "--draws", "0"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("mmpt eval: draws = 0")
