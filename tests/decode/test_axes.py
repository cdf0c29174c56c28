"""Three axes, id by id: decoding stands where packed rows stand."""

import numpy as np
import pytest
import torch

from mmpt.decode.ar import Prefix, generate_block
from mmpt.decode.axes import Axes
from mmpt.decode.denoise import denoise_block
from mmpt.decode.passes import Denoising
from mmpt.decode.sampling import Sampling
from mmpt.model.rotary import axes_of
from mmpt.stream import Rows
from mmpt.vocab import Modality

EXACT = {"atol": 1e-10, "rtol": 0.0}


@pytest.fixture
def model(make_model):
    return make_model(rope="3d", head_width=12)


def test_following_a_stream_equals_the_axes_of_its_row(vocabulary, make_document):
    document = make_document(0, 4)
    row = axes_of(Rows.pack([[document]], len(document), 0))[0].tolist()
    axes = Axes(vocabulary)
    starts = {span.start: span for span in document.spans}
    for index, token in enumerate(document.ids.tolist()):
        if index in starts:
            span = starts[index]
            ahead = [list(place) for place in axes.ahead(span.length)]
            assert ahead == row[index : index + span.length]
        assert list(axes.push(token)) == list(axes.last) == row[index]


def test_cached_prompts_of_different_lengths_equal_the_whole_pass(model, vocabulary, make_document):
    documents = [make_document(0, 2), make_document(1, 7)]
    rows = Rows.pack([[document] for document in documents], 60, 0)
    whole = model(
        rows.ids,
        modality=rows.modality,
        position=rows.position,
        document=rows.document,
        axes=axes_of(rows),
    )
    begun = 9
    prefix = Prefix(
        model, vocabulary, [d.ids[: begun + i] for i, d in enumerate(documents)], None, Sampling()
    )
    for step in range(20):
        for i in range(2):
            torch.testing.assert_close(prefix.hidden[i], whole[i, begun + i + step - 1], **EXACT)
        ids, modality = (
            torch.tensor(
                [[int(getattr(d, name)[begun + i + step])] for i, d in enumerate(documents)]
            )
            for name in ("ids", "modality")
        )
        prefix.append(ids, modality, torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("modality", "shape"),
    [(Modality.IMAGE, (2, 3)), (Modality.VIDEO, (2, 2, 2)), (Modality.SPEECH, (4,))],
)
def test_a_batch_equals_the_singles(model, make_prompts, vocabulary, generators, modality, shape):
    prompts = make_prompts(modality, shape)
    options = {"modality": modality, "length": int(np.prod(shape))}
    options["sampling"] = Sampling(guidance=2.0)
    for decode, more in (
        (generate_block, {}),
        (denoise_block, {"denoising": Denoising(num_passes=2)}),
    ):
        batch = decode(
            model,
            vocabulary,
            prompts,
            generators=generators(0, 1, 2),
            unconditional=prompts[::-1],
            **options,
            **more,
        )
        for i, prompt in enumerate(prompts):
            (single,) = decode(
                model,
                vocabulary,
                [prompt],
                generators=generators(i),
                unconditional=[prompts[2 - i]],
                **options,
                **more,
            )
            assert np.array_equal(single, batch[i])
