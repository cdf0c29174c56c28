import numpy as np
import pytest
import torch

from mmpt.config import UserError
from mmpt.decode.ar import Prefix, generate_block
from mmpt.decode.sampling import Sampling
from mmpt.decode.speculate import Checking, speculate_block
from mmpt.stream import StreamBuilder
from mmpt.vocab import Modality, Vocabulary
from tests.decode.conftest import build_model

SHAPES = {Modality.IMAGE: (2, 3), Modality.VIDEO: (2, 2, 2), Modality.SPEECH: (5,)}


def no_condition(vocabulary, modality, number):
    header = StreamBuilder(vocabulary).structure("<bod>", "<null>")
    return [header.header(modality, SHAPES[modality]).build().ids] * number


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("modality", SHAPES)
def test_the_best_codes_are_those_of_autoregressive_decoding(
    make_model, make_prompts, vocabulary, generators, modality, window
):
    model, prompts = make_model(rope="3d"), make_prompts(modality, SHAPES[modality])
    options = {
        "modality": modality,
        "length": int(np.prod(SHAPES[modality])),
        "sampling": Sampling(temperature=0, guidance=2.0),
        "generators": generators(0, 1, 2),
        "unconditional": no_condition(vocabulary, modality, 3),
    }
    one_by_one = generate_block(model, vocabulary, prompts, **options)
    several = speculate_block(model, vocabulary, prompts, window=window, **options)
    assert np.array_equal(several.codes, one_by_one)
    assert (several.num_passes + several.num_accepted == options["length"]).all()
    assert (several.num_accepted <= several.num_checked).all()


@pytest.mark.parametrize("modality", SHAPES)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_gives_what_its_singles_give(
    make_model, make_prompts, vocabulary, generators, modality, guidance
):
    model, prompts = make_model(), make_prompts(modality, SHAPES[modality])
    null = no_condition(vocabulary, modality, 3)
    options = {
        "modality": modality,
        "length": int(np.prod(SHAPES[modality])),
        "sampling": Sampling(guidance=guidance, top_p=0.9),
        "window": 3,
    }
    batch = speculate_block(
        model, vocabulary, prompts, generators=generators(0, 1, 2), unconditional=null, **options
    )
    for i, prompt in enumerate(prompts):
        single = speculate_block(
            model,
            vocabulary,
            [prompt],
            generators=generators(i),
            unconditional=null[:1],
            **options,
        )
        assert [np.array_equal(x[0], y[i]) for x, y in zip(single, batch, strict=True)] == [
            True
        ] * 4
        assert vocabulary.allowed[modality][batch.codes[i]].all()


def few_codes(**media: str) -> Vocabulary:
    """Three codes of speech, or three in each of two codebooks."""
    books = [(name, 3, {"speech": "speech"}, None) for name in media]
    return Vocabulary.build(num_text=4, text_fingerprint="text", codebooks=books)


def joint_of_codes(model, vocabulary, prompt, null, sampling, books) -> np.ndarray:
    """float64 (3, 3, 3, 3): of four codes, by autoregressive probabilities."""
    joint = torch.ones(1, dtype=torch.float64)
    rows = np.zeros((1, 0), dtype=np.int64)
    for place in range(4):
        candidates = torch.arange(3) + vocabulary.ranges[place % books].start
        full, free = ([np.append(ids, row) for row in rows] for ids in (prompt, null))
        scores = Prefix(model, vocabulary, full, free, sampling).scores(candidates)
        joint = (joint[:, None] * sampling.probabilities(scores)).flatten()
        rows = np.concatenate([rows.repeat(3, 0), np.tile(candidates, len(rows))[:, None]], axis=1)
    return joint.numpy()


@pytest.mark.parametrize(
    ("books", "sampling"),
    [(1, Sampling()), (2, Sampling(guidance=1.5, top_p=0.9, temperature=0.8))],
    ids=["plain", "guided"],
)
def test_codes_have_the_autoregressive_distribution(books, sampling):
    vocabulary = few_codes(**dict.fromkeys("ab"[:books], ""))
    model, num_samples = build_model(vocabulary, "hard", num_layers=1), 1000
    text = StreamBuilder(vocabulary).structure("<bod>").text(np.array([1, 3]))
    prompt = text.header(Modality.SPEECH, (4,)).build().ids
    null = StreamBuilder(vocabulary).structure("<bod>", "<null>")
    null = null.header(Modality.SPEECH, (4,)).build().ids
    drawn = speculate_block(
        model,
        vocabulary,
        [prompt] * num_samples,
        modality=Modality.SPEECH,
        length=4,
        sampling=sampling,
        generators=[torch.Generator().manual_seed(seed) for seed in range(num_samples)],
        unconditional=[null] * num_samples,
        window=2,
    )
    rate = drawn.num_accepted.sum() / drawn.num_checked.sum()
    assert 0.2 < rate < 0.9  # drafts are not the codes by chance
    starts = [vocabulary.ranges[place % books].start for place in range(4)]
    count = np.bincount((np.stack(drawn.codes) - starts) @ [27, 9, 3, 1], minlength=81)
    joint = joint_of_codes(model, vocabulary, prompt, null, sampling, books)
    expected = joint * num_samples
    assert not count[joint == 0].any()  # what filters leave out is never drawn
    common = expected > 5
    chi_square = ((count - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < common.sum() + 4 * np.sqrt(2 * common.sum())


@pytest.mark.parametrize("rope", ["1d", "3d"])
def test_the_cache_is_that_of_an_autoregressive_prefill(
    monkeypatch, make_model, make_prompts, vocabulary, generators, rope
):
    used = []

    class Kept(Checking):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            used.append(self)

    monkeypatch.setattr("mmpt.decode.speculate.Checking", Kept)
    model, prompts = make_model(rope=rope), make_prompts(Modality.IMAGE, (2, 3))
    null = no_condition(vocabulary, Modality.IMAGE, 3)
    sampling = Sampling(guidance=2.0)
    codes = speculate_block(
        model,
        vocabulary,
        prompts,
        modality=Modality.IMAGE,
        length=6,
        sampling=sampling,
        generators=generators(0, 1, 2),
        unconditional=null,
    ).codes
    # all but the last code, which is in no cache yet
    full, free = (
        [np.append(ids, new[:-1]) for ids, new in zip(rows, codes, strict=True)]
        for rows in (prompts, null)
    )
    wanted = Prefix(model, vocabulary, full, free, sampling)
    assert torch.equal(used[0].length, wanted.length)
    for row in range(6):
        for ours, theirs in zip(used[0].cache.layers, wanted.cache.layers, strict=True):
            torch.testing.assert_close(_seen(used[0], ours, row), _seen(wanted, theirs, row))


def _seen(prefix: Prefix, layer, row: int) -> torch.Tensor:
    # keys and values (2, K, ids, W) of a row by position, without pads
    layout = prefix.cache.layout
    assert layout is not None
    assert (layout.block[row][layout.document[row] >= 0] == -1).all()
    slots = (layout.document[row] >= 0).nonzero()[:, 0]
    slots = slots[layout.position[row, slots].argsort()]
    return layer._slots[row, :, :, slots]


def test_what_cannot_be_speculated_is_refused(make_model, make_prompts, vocabulary, generators):
    prompts = make_prompts(Modality.IMAGE, (2, 3))
    options = {
        "modality": Modality.IMAGE,
        "sampling": Sampling(),
        "generators": generators(0, 1, 2),
    }
    with pytest.raises(UserError, match="check at least 1 draft"):
        speculate_block(make_model(), vocabulary, prompts, length=6, window=0, **options)
    with pytest.raises(UserError, match="has 6 to come"):
        speculate_block(make_model(), vocabulary, prompts, length=7, **options)
    with pytest.raises(UserError, match="no noisy group"):
        speculate_block(make_model(noisy=False), vocabulary, prompts, length=6, **options)
