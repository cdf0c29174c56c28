"""Speech of a length that the model chooses: whole spans, within the limit, reproducible."""

import numpy as np
import pytest
import torch

from mmpt.decode.passes import Denoising
from mmpt.decode.sampling import Sampling
from mmpt.decode.speech import speak
from mmpt.stream import StreamBuilder, parse
from mmpt.vocab import Modality


@pytest.mark.parametrize("num_passes", [None, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_speech_is_whole_spans_within_its_limit(make_model, vocabulary, num_passes, guidance):
    model = make_model()
    prompt = StreamBuilder(vocabulary).structure("<bod>").text([1, 2, 3]).build().ids
    free = StreamBuilder(vocabulary).structure("<bod>", "<null>").build().ids
    for seed, max_codes in ((0, 1), (1, 7), (2, 40)):
        options = {
            "max_codes": max_codes,
            "denoising": None if num_passes is None else Denoising(num_passes=num_passes),
            "sampling": Sampling(guidance=guidance),
            "unconditional": free,
        }
        made, again = (
            speak(
                model, vocabulary, prompt, generator=torch.Generator().manual_seed(seed), **options
            )
            for _ in range(2)
        )
        assert np.array_equal(made, again)
        assert np.array_equal(made[: len(prompt)], prompt)
        segments = list(parse(made[len(prompt) :], vocabulary))
        assert segments
        assert {segment.modality for segment in segments} == {Modality.SPEECH}
        assert all(len(segment.codes) <= 26 for segment in segments)
        assert 1 <= sum(len(segment.codes) for segment in segments) <= max_codes
