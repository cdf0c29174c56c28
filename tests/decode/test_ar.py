import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.ar import Prefix, generate, generate_block, generate_steps
from mmpt.decode.sampling import Sampling
from mmpt.model.step import Stepper
from mmpt.stream import StreamBuilder, parse
from mmpt.vocab import Modality

SHAPES = {Modality.IMAGE: (2, 3), Modality.VIDEO: (2, 2, 2), Modality.SPEECH: (4,)}


@pytest.mark.parametrize("modality", SHAPES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_of_blocks_equals_the_singles(
    make_model, make_prompts, vocabulary, generators, modality, guidance
):
    model, prompts = make_model(), make_prompts(modality, SHAPES[modality])
    null = StreamBuilder(vocabulary).structure("<bod>", "<null>").header(modality, SHAPES[modality])
    options = {
        "modality": modality,
        "length": int(np.prod(SHAPES[modality])),
        "sampling": Sampling(guidance=guidance, temperature=1.5),
    }
    batch = generate_block(
        model,
        vocabulary,
        prompts,
        generators=generators(0, 1, 2),
        unconditional=[null.build().ids] * 3,
        **options,
    )
    for i, prompt in enumerate(prompts):
        single = generate_block(
            model,
            vocabulary,
            [prompt],
            generators=generators(i),
            unconditional=[null.build().ids],
            **options,
        )
        assert np.array_equal(single[0], batch[i])
        assert len(batch[i]) == options["length"]
        assert vocabulary.allowed[modality][batch[i]].all()
    assert len({tuple(ids) for ids in batch}) == 3


def test_greedy_codes_are_those_of_whole_passes(make_model, make_prompts, vocabulary, generators):
    model, prompts = make_model(), make_prompts(Modality.IMAGE, (2, 3))
    options = {"modality": Modality.IMAGE, "length": 6, "sampling": Sampling(temperature=0)}
    batch = generate_block(model, vocabulary, prompts, generators=generators(0, 1, 2), **options)
    for prompt, codes in zip(prompts, batch, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, codes]))[None]
        modality = torch.zeros_like(ids)
        modality[:, len(prompt) :] = Modality.IMAGE
        scores = model.logits(model(ids, modality=modality))[0, len(prompt) - 1 : -1]
        scores[:, ~torch.from_numpy(vocabulary.allowed[Modality.IMAGE])] = -torch.inf
        assert scores.argmax(-1).tolist() == codes.tolist()


def test_guidance_runs_the_second_branch_only_when_it_acts(make_model, make_prompts, vocabulary):
    model, prompts = make_model(), make_prompts(Modality.IMAGE, (2, 3))
    off = Prefix(model, vocabulary, prompts, prompts, Sampling())
    on = Prefix(model, vocabulary, prompts, prompts, Sampling(guidance=3.0))
    assert (len(off.length), len(on.length)) == (3, 6)
    torch.testing.assert_close(
        off.scores(), on.scores()
    )  # equal branches: guidance changes nothing


@pytest.mark.parametrize("max_ids", [1, 6, 40])
def test_free_generation_writes_whole_spans_within_its_limit(
    make_model, vocabulary, generators, max_ids
):
    model = make_model()
    prompts = [np.array([vocabulary.structure_id("<bod>"), *range(n)]) for n in (1, 5, 3)]
    out = generate(
        model,
        vocabulary,
        prompts,
        max_ids=max_ids,
        sampling=Sampling(temperature=3.0),
        generators=generators(0, 1, 2),
    )
    eod = vocabulary.structure_id("<eod>")
    for prompt, ids in zip(prompts, out, strict=True):
        list(parse(np.concatenate([prompt, ids]), vocabulary))  # raises at a broken span
        assert len(ids) == max_ids or ids[-1] == eod
        assert eod not in ids[:-1]


def test_a_batch_of_free_generations_equals_the_singles(make_model, vocabulary, generators):
    model = make_model()
    prompts = [np.array([vocabulary.structure_id("<bod>"), *range(n)]) for n in (1, 6, 3, 2)]
    shapes = {m: [shape] for m, shape in SHAPES.items()}
    options = {"max_ids": 50, "sampling": Sampling(temperature=4.0), "shapes": shapes}
    together, alone = generators(0, 1, 2, 3), generators(0, 1, 2, 3)
    batch = generate(model, vocabulary, prompts, generators=together, **options)
    for i, prompt in enumerate(prompts):
        single = generate(model, vocabulary, [prompt], generators=[alone[i]], **options)
        assert np.array_equal(single[0], batch[i])
        # and it leaves its generator where the single left it, whatever the others do
        assert torch.equal(alone[i].get_state(), together[i].get_state())
    assert len({len(ids) for ids in batch}) > 1


def test_steps_stream_the_same_ids_with_their_media(make_model, vocabulary, generators):
    model, prompt = make_model(), np.array([vocabulary.structure_id("<bod>"), 3])
    options = {"max_ids": 30, "sampling": Sampling(temperature=4.0), "allow": {Modality.SPEECH}}
    whole = generate(model, vocabulary, [prompt], generators=generators(1), **options)
    steps = list(generate_steps(model, vocabulary, [prompt], generators=generators(1), **options))
    assert [step.ids[0] for step in steps] == whole[0].tolist()
    speech = vocabulary.allowed[Modality.SPEECH]
    assert all((step.modality[0] == Modality.SPEECH) == speech[step.ids[0]] for step in steps)


def test_a_stop_at_headers_leaves_a_prompt_for_a_parallel_block(make_model, vocabulary, generators):
    model, prompt = make_model(), np.array([vocabulary.structure_id("<bod>"), 3])
    options = {"sampling": Sampling(temperature=4.0), "generators": generators(1)}
    shapes = {Modality.IMAGE: [(2, 3)]}
    (ids,) = generate(
        model,
        vocabulary,
        [prompt],
        max_ids=40,
        allow={Modality.IMAGE},
        shapes=shapes,
        stop="header",
        **options,
    )
    assert (
        ids.tolist()
        == StreamBuilder(vocabulary).header(Modality.IMAGE, (2, 3)).build().ids.tolist()
    )
    full = np.concatenate([prompt, ids])
    (codes,) = generate_block(
        model, vocabulary, [full], modality=Modality.IMAGE, length=6, **options
    )
    (rest,) = generate(model, vocabulary, [np.concatenate([full, codes])], max_ids=1, **options)
    assert rest.tolist() == [vocabulary.structure_id("<eoi>")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 7}, "7 image codes were asked for, but the prompt has 6"),
        ({"modality": Modality.SPEECH}, "end it with the header of a speech span"),
        ({"sampling": Sampling(guidance=2.0)}, "needs unconditional prompts"),
    ],
)
def test_blocks_that_do_not_fit_their_prompt_are_refused(
    make_model, make_prompts, vocabulary, generators, options, message
):
    given = {"modality": Modality.IMAGE, "length": 6, "sampling": Sampling(), **options}
    with pytest.raises(UserError, match=message):
        generate_block(
            make_model(),
            vocabulary,
            make_prompts(Modality.IMAGE, (2, 3)),
            generators=generators(0, 1, 2),
            **given,
        )


def test_an_open_span_that_cannot_be_completed_is_refused(
    make_model, make_prompts, vocabulary, generators
):
    prompts = make_prompts(Modality.IMAGE, (2, 3))[:1]
    options = {"sampling": Sampling(), "generators": generators(0)}
    with pytest.raises(UserError, match="needs 7 ids; max_ids is 6"):
        generate(make_model(), vocabulary, prompts, max_ids=6, **options)
    (ids,) = generate(make_model(), vocabulary, prompts, max_ids=7, **options)
    assert ids[-1] == vocabulary.structure_id("<eoi>")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_steps_write_what_the_decoder_alone_writes(
    make_model, vocabulary, generators, monkeypatch, guidance
):
    model = make_model()
    prompts = [np.array([vocabulary.structure_id("<bod>"), *range(n)]) for n in (1, 6, 3)]
    options = {
        "max_ids": 30,
        "sampling": Sampling(temperature=4.0, guidance=guidance),
        "shapes": {m: [shape] for m, shape in SHAPES.items()},
        "unconditional": [np.array([vocabulary.structure_id("<bod>")])] * 3,
    }
    ours = generate(model, vocabulary, prompts, generators=generators(0, 1, 2), **options)
    assert len({len(ids) for ids in ours}) > 1  # some stop before others
    monkeypatch.setattr(Stepper, "of", lambda model: None)
    plain = generate(model, vocabulary, prompts, generators=generators(0, 1, 2), **options)
    assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in plain]
