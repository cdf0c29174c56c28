"""Speech of several codebooks: both decoders draw each id from the codebook of its position."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmpt.data.codes import count_codes, with_used_codes
from mmpt.data.layout import write_segments
from mmpt.data.tokens import EncodedDocument, ShardWriter, TokenShard
from mmpt.decode.ar import generate_block
from mmpt.decode.denoise import denoise_block
from mmpt.decode.dida import corrupt, denoising_loss, joint_forward
from mmpt.decode.passes import Denoising
from mmpt.decode.sampling import Sampling
from mmpt.decode.speech import speak
from mmpt.stream import Rows, Segment, StreamBuilder, parse
from mmpt.vocab import Modality, Vocabulary

SPEECH = Modality.SPEECH
USED = (None, (0, 3), (1, 2, 5))  # of each codebook


@pytest.fixture
def vocabulary() -> Vocabulary:
    """Three codebooks of speech, with other numbers of used codes."""
    return Vocabulary.build(
        num_text=20,
        text_fingerprint="text",
        codebooks=[(f"speech-{q}", 6, {"speech": "s"}, used) for q, used in enumerate(USED)],
    )


@pytest.mark.parametrize("num_passes", [None, 1, 3])
def test_blocks_hold_legal_used_codes_of_every_codebook(
    make_model, make_prompts, generators, vocabulary, num_passes
):
    options = {
        "modality": SPEECH,
        "length": 12,
        "sampling": Sampling(),
        "generators": generators(0, 1, 2),
    }
    prompts = make_prompts(SPEECH, (12,))
    if num_passes is None:
        made = generate_block(make_model(), vocabulary, prompts, **options)
    else:
        options["denoising"] = Denoising(num_passes=num_passes)
        made = denoise_block(make_model(), vocabulary, prompts, **options)
    drawn = [set(), set(), set()]
    for ids in made:
        codes = vocabulary.codes_of(SPEECH, ids)
        assert codes is not None
        for place, code in enumerate(codes.tolist()):
            drawn[place % 3].add(code)
    assert drawn[0] <= set(range(6))
    assert all(drawn[q] <= set(USED[q]) and len(drawn[q]) > 1 for q in (1, 2))


@pytest.mark.parametrize("num_passes", [None, 2])
def test_speech_of_several_codebooks_is_whole_frames(make_model, vocabulary, num_passes):
    prompt = StreamBuilder(vocabulary).structure("<bod>").text([1]).build().ids
    ids = speak(
        make_model(),
        vocabulary,
        prompt,
        max_codes=20,
        denoising=None if num_passes is None else Denoising(num_passes=num_passes),
        sampling=Sampling(),
        generator=torch.Generator().manual_seed(0),
    )
    spans = list(parse(ids[len(prompt) :], vocabulary))
    assert spans
    assert all(len(span.codes) % 3 == 0 for span in spans)


def test_noise_and_loss_stay_in_the_codebook_of_a_position(make_model, vocabulary):
    rng = np.random.default_rng(0)
    books = [rng.choice(USED[q] or range(6), 5) for q in range(3)]
    codes = np.stack(books, axis=1).reshape(-1)
    builder = StreamBuilder(vocabulary).structure("<bod>").media(SPEECH, codes)
    rows = Rows.pack([[builder.structure("<eod>").build()]], 24, vocabulary.structure_id("<pad>"))
    model = make_model()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        joint = corrupt(rows, vocabulary, generators=[generator] * len(rows.ids), max_noisy=32)
        noisy = joint.ids[0, joint.num_clean + 1 :].numpy()
        assert vocabulary.codes_of(SPEECH, noisy) is not None
        loss = denoising_loss(model, vocabulary, joint, joint_forward(model, joint))[SPEECH]
        assert torch.isfinite(loss.nats)
        assert loss.weight == 15


def test_shards_keep_the_codes_and_count_them_by_codebook(tmp_path: Path, vocabulary):
    rng = np.random.default_rng(0)
    documents = [
        EncodedDocument(f"d{n}", f"d{n}", "any", [Segment(SPEECH, rng.integers(0, 6, 90))])
        for n in range(30)
    ]
    path = tmp_path / "a.tokens.tar"
    with ShardWriter(path, vocabulary) as writer:
        for document in documents:
            writer.add(document)
        writer.finish()
    read = list(TokenShard(path))
    assert all(
        np.array_equal(ours.segments[0].codes, theirs.segments[0].codes)
        for ours, theirs in zip(read, documents, strict=True)
    )
    counts = count_codes([path], vocabulary)
    assert counts[SPEECH].shape == (3, 6)
    assert len(set(counts[SPEECH].sum(1).tolist())) == 1
    counts[SPEECH][1, 2] = 0
    used = [r.used for r in with_used_codes(vocabulary, counts).ranges]
    assert used == [tuple(range(6)), (0, 1, 3, 4, 5), tuple(range(6))]
    builder = StreamBuilder(vocabulary)
    write_segments(builder, read[0].segments, np.array([1]))
    assert [span.length for span in builder.build().spans] == [78, 12]
