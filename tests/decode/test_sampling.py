import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.sampling import Grammar, Sampling, draw, guide, uniforms
from mmpt.stream import StreamBuilder, parse
from mmpt.vocab import Modality, Vocabulary


def test_draws_follow_the_distribution_and_skip_what_is_impossible():
    logits = torch.tensor([0.0, -torch.inf, 1.0, 2.0]).expand(40_000, 4)
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = Sampling().probabilities(logits)
    share = torch.bincount(draw(p, uniform), minlength=4) / 40_000
    assert share[1] == 0
    assert (share - p[0]).abs().max() < 0.01


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_candidates(uniform):
    p = Sampling().probabilities(torch.tensor([-torch.inf, 0.3, 0.1, -torch.inf]))
    assert int(draw(p, torch.tensor(uniform, dtype=torch.float64))) in (1, 2)


def test_filters_keep_the_best():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert Sampling(top_k=2).probabilities(logits).nonzero().flatten().tolist() == [0, 1]
    assert Sampling(top_p=0.7).probabilities(logits).nonzero().flatten().tolist() == [0, 1]
    assert Sampling(top_p=0.4).probabilities(logits).tolist() == [1, 0, 0, 0]
    assert Sampling(temperature=0).probabilities(logits).tolist() == [1, 0, 0, 0]
    cold = Sampling(temperature=0.5).probabilities(logits)
    torch.testing.assert_close(cold[0] / cold[1], torch.tensor((0.5 / 0.3) ** 2).double())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": NAN},
        {"guidance": NAN},
        {"guidance": INF},
    ],
)
def test_a_senseless_setting_is_refused(values):
    with pytest.raises(UserError):
        Sampling(**values)


def test_guidance_of_one_is_the_conditional_score():
    c, u = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])
    assert torch.equal(guide(c, u, 1.0), c)
    assert guide(c, u, 2.0).tolist() == [2.0, -1.0]


def test_a_row_of_uniforms_depends_on_its_own_generator_only(generators):
    both = uniforms(generators(0, 1), 5, torch.device("cpu"))
    assert torch.equal(both[1:], uniforms(generators(1), 5, torch.device("cpu")))


def test_the_grammar_tells_the_medium_of_every_id(vocabulary, make_document):
    document = make_document(0)
    assert np.array_equal(Grammar(vocabulary).read(document.ids), document.modality)


def test_random_walks_of_the_grammar_are_whole_documents_that_fit(vocabulary):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        grammar, ids = Grammar(vocabulary), []
        num_ids = int(rng.integers(1, 40))
        while len(ids) < num_ids and not grammar.ended:
            possible = grammar.candidates(num_ids - len(ids)).nonzero()[0]
            begins = [i for i in possible if vocabulary.structure_id("<boi>") <= i < 30]
            ids.append(int(rng.choice(begins if begins and rng.random() < 0.3 else possible)))
            grammar.push(ids[-1])
        assert grammar.open is None
        segments = list(parse(ids, vocabulary))
        allowed = {m: vocabulary.allowed[m] for m in Modality}
        for segment in segments:
            if segment.modality != Modality.TEXT:
                start = vocabulary.range_of(segment.modality).start
                assert allowed[segment.modality][segment.codes + start].all()


def test_only_given_shapes_and_media_are_begun(vocabulary):
    shapes = {Modality.IMAGE: [(2, 3), (4, 4)]}
    grammar = Grammar(vocabulary, allow={Modality.IMAGE}, shapes=shapes)
    boi, eod = vocabulary.structure_id("<boi>"), vocabulary.structure_id("<eod>")
    assert grammar.candidates(30).nonzero()[0].tolist() == [eod, boi]
    assert grammar.candidates(9).nonzero()[0].tolist() == [eod]
    grammar.push(boi)
    sizes = [vocabulary.size_id(2), vocabulary.size_id(4)]
    assert grammar.candidates(29).nonzero()[0].tolist() == sizes
    assert grammar.candidates(10).nonzero()[0].tolist() == sizes[:1]
    grammar.push(sizes[0])
    assert grammar.candidates(28).nonzero()[0].tolist() == [vocabulary.size_id(3)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda v: [v.range_of(Modality.IMAGE).start], "outside a media span"),
        (lambda v: [v.structure_id("<boi>"), 3], "needs a size"),
        (lambda v: [v.structure_id("<boa>"), v.size_id(1), 3], "codes belong"),
        (lambda v: [v.structure_id("<boa>"), v.size_id(1), len(v) - 1, 3], "header says"),
    ],
)
def test_ids_that_break_the_grammar_are_refused(vocabulary, build, message):
    with pytest.raises(UserError, match=message):
        Grammar(vocabulary).read(np.array(build(vocabulary)))


def test_a_builder_and_the_grammar_agree_on_frames(vocabulary):
    grammar = Grammar(vocabulary)
    grammar.read(StreamBuilder(vocabulary).header(Modality.VIDEO, (4, 2, 3)).build().ids)
    assert (grammar.in_codes, grammar.remaining, grammar.block) == (True, 24, 6)


def test_a_span_of_several_codebooks_takes_them_in_turn() -> None:
    vocabulary = Vocabulary.build(
        num_text=300,
        text_fingerprint="t",
        codebooks=[(f"speech-{index}", 4, {"speech": "s"}, None) for index in range(3)],
    )
    begin, first = vocabulary.structure_id("<boa>"), vocabulary.size_id(1)
    grammar = Grammar(vocabulary)
    grammar.push(begin)
    assert (np.flatnonzero(grammar.candidates(12)) - first + 1).tolist() == [3, 6, 9]
    grammar.push(vocabulary.size_id(6))
    for place in range(6):
        mask = grammar.candidates(12)
        assert np.array_equal(mask, vocabulary.allowed_at(Modality.SPEECH, place))
        wrong = vocabulary.ranges_of(Modality.SPEECH)[(place + 1) % 3].start
        with pytest.raises(UserError, match="where speech codes belong"):
            grammar.push(wrong)
        assert grammar.push(int(np.flatnonzero(mask)[-1])) == Modality.SPEECH
    assert np.flatnonzero(grammar.candidates(12)).tolist() == [vocabulary.structure_id("<eoa>")]
    given = Grammar(vocabulary, shapes={Modality.SPEECH: [(size,) for size in range(1, 8)]})
    given.push(begin)
    assert (np.flatnonzero(given.candidates(12)) - first + 1).tolist() == [3, 6]
    with pytest.raises(UserError, match="4 speech codes are no whole frames of 3"):
        given.push(vocabulary.size_id(4))
