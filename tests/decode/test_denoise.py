from dataclasses import replace

import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.ar import generate
from mmpt.decode.denoise import denoise_block, denoise_passes
from mmpt.decode.passes import Denoising
from mmpt.decode.prefix import Prefix
from mmpt.decode.sampling import Sampling
from mmpt.decode.text import denoise_text
from mmpt.model.config import GroupConfig, NoiseConfig
from mmpt.model.transformer import Decoder
from mmpt.stream import StreamBuilder, parse
from mmpt.vocab import Modality

TWO = Denoising(num_passes=2)
TEXT_OPTIONS = {"sampling": Sampling(), "generators": []}
SAMPLERS = [
    ("mixture", Denoising(num_passes=3)),
    ("metric", Denoising(num_passes=3)),
    ("mixture", Denoising(num_passes=3, sampler="tau", corrections=1)),
    ("metric", Denoising(num_passes=3, sampler="tau")),
    ("masked", Denoising(num_passes=3, sampler="remask")),
    ("masked", Denoising(num_passes=3, sampler="maskgit")),
    ("masked", Denoising(num_passes=3, sampler="entropy", entropy_bound=2.0)),
    ("masked", Denoising(num_passes=3, sampler="threshold", threshold=0.3)),
    ("masked", Denoising(num_passes=3, sampler="diagonal")),
]


@pytest.mark.parametrize(
    ("modality", "shape"),
    [(Modality.IMAGE, (2, 3)), (Modality.VIDEO, (3, 2, 2)), (Modality.SPEECH, (5,))],
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_of_denoised_blocks_equals_the_singles(
    make_model, make_prompts, vocabulary, generators, modality, shape, guidance
):
    model, prompts = make_model(), make_prompts(modality, shape)
    null = (
        StreamBuilder(vocabulary).structure("<bod>", "<null>").header(modality, shape).build().ids
    )
    options = {
        "modality": modality,
        "length": int(np.prod(shape)),
        "denoising": Denoising(num_passes=3),
        "sampling": Sampling(guidance=guidance),
    }
    seen = []
    batch = denoise_block(
        model,
        vocabulary,
        prompts,
        generators=generators(0, 1, 2),
        unconditional=[null] * 3,
        on_pass=lambda at: seen.append((at.done, len(at.codes[0]))),
        **options,
    )
    for i, prompt in enumerate(prompts):
        single = denoise_block(
            model,
            vocabulary,
            [prompt],
            generators=generators(i),
            unconditional=[null],
            **options,
        )
        assert np.array_equal(single[0], batch[i])
        assert vocabulary.allowed[modality][batch[i]].all()
    frame = int(np.prod(shape[-2:]))
    num_blocks = options["length"] // frame
    assert seen == [(k + 1, frame * (k // 3 + 1)) for k in range(3 * num_blocks)]


def test_generation_goes_on_behind_a_denoised_block(
    make_model, make_prompts, vocabulary, generators
):
    model, (prompt, *_) = make_model(), make_prompts(Modality.VIDEO, (2, 2, 2))
    options = {"sampling": Sampling(), "generators": generators(0)}
    (codes,) = denoise_block(
        model, vocabulary, [prompt], modality=Modality.VIDEO, length=8, denoising=TWO, **options
    )
    whole = np.concatenate([prompt, codes])
    (rest,) = generate(model, vocabulary, [whole], max_ids=5, **options)
    segments = list(parse(np.concatenate([whole, rest]), vocabulary))
    assert segments[1].codes.shape == (2, 2, 2)


def test_frames_may_be_denoised_one_call_at_a_time(
    make_model, make_prompts, vocabulary, generators
):
    model, (prompt, *_) = make_model(), make_prompts(Modality.VIDEO, (2, 2, 2))
    options = {"modality": Modality.VIDEO, "denoising": TWO, "sampling": Sampling()}
    (whole,) = denoise_block(
        model, vocabulary, [prompt], length=8, generators=generators(0), **options
    )
    one = generators(0)
    (first,) = denoise_block(model, vocabulary, [prompt], length=4, generators=one, **options)
    longer = np.concatenate([prompt, first])
    (second,) = denoise_block(model, vocabulary, [longer], length=4, generators=one, **options)
    assert np.array_equal(np.concatenate([first, second]), whole)


def test_what_cannot_be_denoised_is_refused(make_model, make_prompts, vocabulary, generators):
    prompts = make_prompts(Modality.VIDEO, (2, 2, 2))
    options = {
        "modality": Modality.VIDEO,
        "sampling": Sampling(),
        "generators": generators(0, 1, 2),
    }
    with pytest.raises(UserError, match="whole number of blocks"):
        denoise_block(make_model(), vocabulary, prompts, length=6, **options)
    order = Denoising(sampler="raster", num_passes=5)
    with pytest.raises(UserError, match="in at most 4"):
        denoise_block(make_model(), vocabulary, prompts, length=4, denoising=order, **options)
    for held, message in (([np.zeros(3)] * 3, "held ids of shape"), ([None], "as many of held")):
        with pytest.raises(UserError, match=message):
            denoise_block(make_model(), vocabulary, prompts, length=4, held=held, **options)
    short = make_model(noise=NoiseConfig(max_block=3))
    with pytest.raises(UserError, match="adapted to at most 3"):
        denoise_block(short, vocabulary, prompts, length=4, **options)
    with pytest.raises(UserError, match="not adapted to blocks of text"):
        [*denoise_text(make_model(), vocabulary, prompts, max_ids=4, **TEXT_OPTIONS)]
    options["sampling"] = Sampling(guidance=2.0)
    with pytest.raises(UserError, match="needs unconditional prompts"):
        denoise_block(make_model(), vocabulary, prompts, length=4, **options)
    options["sampling"] = Sampling()
    with pytest.raises(UserError, match="no noisy group"):
        denoise_block(make_model(noisy=False), vocabulary, prompts, length=4, **options)


def _images(vocabulary, shapes):
    """A prompt for an image of each shape, and the unconditional one."""
    builders = [
        StreamBuilder(vocabulary)
        .structure("<bod>")
        .text(range(2 + n))
        .header(Modality.IMAGE, shape)
        for n, shape in enumerate(shapes)
    ]
    free = [
        StreamBuilder(vocabulary).structure("<bod>", "<null>").header(Modality.IMAGE, shape)
        for shape in shapes
    ]
    return [b.build().ids for b in builders], [b.build().ids for b in free]


@pytest.mark.parametrize(("path", "denoising"), SAMPLERS, ids=lambda x: getattr(x, "sampler", x))
def test_a_batch_of_blocks_of_any_size_with_held_codes_equals_the_singles(
    make_model, vocabulary, generators, path, denoising
):
    model, shapes = make_model(noise=NoiseConfig(path=path)), [(2, 3), (1, 4), (3, 3)]
    prompts, free = _images(vocabulary, shapes)
    lengths = [6, 4, 9]
    held = [np.full(n, -1) for n in lengths]
    held[2][4:7] = vocabulary.ids_of(Modality.IMAGE, np.array([3, 7, 1]))  # 3 and 7 are dead codes
    options = {"modality": Modality.IMAGE, "sampling": Sampling(guidance=1.5)}
    options["denoising"] = denoising
    *_, batch = denoise_passes(
        model,
        vocabulary,
        prompts,
        length=lengths,
        generators=generators(0, 1, 2),
        unconditional=free,
        held=held,
        **options,
    )
    assert batch.committed == lengths
    for i, prompt in enumerate(prompts):
        passes = denoise_passes(
            model,
            vocabulary,
            [prompt],
            length=lengths[i],
            generators=generators(i),
            unconditional=[free[i]],
            held=[held[i]],
            **options,
        )
        committed = [0]
        for single in passes:
            stay = held[i] >= 0
            assert np.array_equal(single.codes[0][stay], held[i][stay])
            assert vocabulary.codes_of(Modality.IMAGE, single.codes[0]) is not None
            committed += single.committed
        assert np.array_equal(single.codes[0], batch.codes[i])
        assert committed == sorted(committed)


def test_all_that_is_held_takes_no_pass(make_model, vocabulary, generators):
    prompts, _ = _images(vocabulary, [(2, 2)])
    held = [vocabulary.ids_of(Modality.IMAGE, np.arange(4))]
    options = {"modality": Modality.IMAGE, "length": 4, "sampling": Sampling(), "held": held}
    passes = [
        *denoise_passes(make_model(), vocabulary, prompts, generators=generators(0), **options)
    ]
    assert [(p.done, p.nfe, p.codes[0].tolist()) for p in passes] == [(0, 0, held[0].tolist())]


@pytest.mark.parametrize(
    ("guidance", "denoising", "nfe"),
    [
        (1.0, Denoising(num_passes=4), [1, 2, 3, 4, 6, 7, 8, 9]),
        (2.0, Denoising(num_passes=4), [2, 4, 6, 8, 12, 14, 16, 18]),
        (2.0, Denoising(num_passes=4, guidance_interval=(0.4, 0.6)), [1, 2, 4, 5, 8, 9, 11, 12]),
    ],
)
def test_passes_are_counted_with_both_branches_and_commits(
    make_model, make_prompts, vocabulary, generators, guidance, denoising, nfe
):
    prompts = make_prompts(Modality.VIDEO, (2, 1, 2))
    passes = denoise_passes(
        make_model(),
        vocabulary,
        prompts,
        modality=Modality.VIDEO,
        length=4,
        sampling=Sampling(guidance=guidance),
        generators=generators(0, 1, 2),
        unconditional=prompts,
        denoising=denoising,
    )
    assert [each.nfe for each in passes] == nfe


@pytest.mark.parametrize("changes", [{}, {"rope": "3d", "head_width": 12}])
def test_committed_blocks_leave_the_caches_that_a_prompt_would(make_model, vocabulary, changes):
    model, sampling = make_model(**changes), Sampling(guidance=2.0)
    shapes = [(2, 3), (1, 4)]
    prompts, free = _images(vocabulary, shapes)
    codes = [np.random.default_rng(n).choice(vocabulary.ranges[0].used, n) for n in (6, 4)]
    ids = [vocabulary.ids_of(Modality.IMAGE, each) for each in codes]
    written = Prefix(model, vocabulary, prompts, free, sampling)
    block, live = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool)
    for row, each in enumerate(ids):
        block[row, : len(each)], live[row, : len(each)] = torch.from_numpy(each), True
    hidden = written.append(block, torch.full_like(block, Modality.IMAGE), live)
    whole = [
        [np.concatenate(pair) for pair in zip(before, ids, strict=True)]
        for before in (prompts, free)
    ]
    read = Prefix(model, vocabulary, *whole, sampling)
    for one, other in zip(written.cache.layers, read.cache.layers, strict=True):
        for row in range(4):
            kept = [
                layer._slots[row, :, :, : len(cache)][:, :, cache.layout.document[row] >= 0]
                for layer, cache in ((one, written.cache), (other, read.cache))
            ]
            torch.testing.assert_close(*kept, rtol=0, atol=1e-10)
    torch.testing.assert_close(written.hidden, read.hidden, rtol=0, atol=1e-10)
    last = torch.stack([hidden[row, n - 1] for row, n in enumerate((6, 4, 6, 4))])
    torch.testing.assert_close(last, read.hidden, rtol=0, atol=1e-10)
    assert len(set(written.length.tolist())) > 1


def test_equal_prompts_are_computed_once_and_mean_the_same(make_model, make_prompts, vocabulary):
    model, prompts = make_model(), make_prompts(Modality.IMAGE, (2, 3))
    null, _ = _images(vocabulary, [(2, 3)])
    shared = Prefix(model, vocabulary, prompts, null * 3, Sampling(guidance=2.0))
    for row, ids in enumerate([*prompts, *null * 3]):
        alone = Prefix(model, vocabulary, [ids], None, Sampling())
        torch.testing.assert_close(shared.hidden[row], alone.hidden[0], rtol=0, atol=1e-10)
        assert shared.length[row] == len(ids)


@pytest.fixture
def text_model(make_model):
    """With a noisy group for text, in blocks of four."""
    config = make_model(noisy=False).config
    groups = {**config.groups, "noisy_text": GroupConfig(modalities=("text",), noisy=True)}
    noise = NoiseConfig(path="masked", text_block=4)
    return Decoder.from_config(replace(config, groups=groups, noise=noise), seed=3).double()


def test_text_blocks_hold_text_and_end_where_they_may(text_model, vocabulary, generators):
    prompts = [np.array([vocabulary.structure_id("<bod>"), *range(n)]) for n in (1, 6, 3, 2)]
    eod = vocabulary.structure_id("<eod>")
    options = {"max_ids": 10, "sampling": Sampling(), "denoising": TWO}
    *_, batch = denoise_text(
        text_model, vocabulary, prompts, generators=generators(0, 1, 2, 3), **options
    )
    for i, prompt in enumerate(prompts):
        *_, single = denoise_text(
            text_model, vocabulary, [prompt], generators=generators(i), **options
        )
        assert np.array_equal(single.codes[0], batch.codes[i])
        ids = batch.codes[i]
        assert len(ids) == 10 or ids[-1] == eod
        assert (ids[:-1] < vocabulary.num_text).all()
