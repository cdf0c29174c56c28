"""Speech of a length that the model chooses: spans of at most 26 frames, one after another.

The model writes each span's header one id at a time, and so decides how long the span is and
whether another one follows; the codes are filled in by either decoder.
"""

from collections.abc import Collection, Iterator

import numpy as np
import torch

from mmpt.data.layout import speech_span
from mmpt.decode.ar import block_steps, generate_steps
from mmpt.decode.denoise import denoise_passes
from mmpt.decode.passes import Denoising
from mmpt.decode.pool import Pool
from mmpt.decode.sampling import Sampling
from mmpt.model.transformer import Decoder
from mmpt.vocab import BEGIN, END, Modality, Vocabulary

SPEECH = Modality.SPEECH
HEADER = 2  # ids: begin, size


def speak(
    model: Decoder,
    vocabulary: Vocabulary,
    prompt: np.ndarray,
    *,
    max_codes: int,
    denoising: Denoising | None,
    sampling: Sampling,
    generator: torch.Generator,
    unconditional: np.ndarray | None = None,
) -> np.ndarray:
    """The prompt and what `speak_spans` yields behind it, as ids (n,)."""
    spans = speak_spans(
        model,
        vocabulary,
        prompt,
        max_codes=max_codes,
        denoising=denoising,
        sampling=sampling,
        generator=generator,
        unconditional=unconditional,
    )
    return np.concatenate([prompt, *spans])


def speak_spans(
    model: Decoder,
    vocabulary: Vocabulary,
    prompt: np.ndarray,
    *,
    max_codes: int,
    denoising: Denoising | None,
    sampling: Sampling,
    generator: torch.Generator,
    unconditional: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """At least one span of speech behind the prompt, as ids (n,): what `speak_steps` finishes."""
    steps = speak_steps(
        model,
        vocabulary,
        prompt,
        max_codes=max_codes,
        denoising=denoising,
        sampling=sampling,
        generator=generator,
        unconditional=unconditional,
    )
    return (span for span in steps if span is not None)


def speak_steps(
    model: Decoder,
    vocabulary: Vocabulary,
    prompt: np.ndarray,
    *,
    max_codes: int,
    denoising: Denoising | None,
    sampling: Sampling,
    generator: torch.Generator,
    ends: Collection[str] = ("<eod>",),
    unconditional: np.ndarray | None = None,
    pool: Pool | None = None,
) -> Iterator[np.ndarray | None]:
    """At least one span of speech behind the prompt, each as ids (n,) as soon as it is written;
    None behind each pass before.

    prompt: ids that end outside a span. denoising: None decodes one id at a time; samplers by order
    take at most as many passes as a span has codes. It ends when the model writes one of
    `ends` (which comes last then), or after `max_codes` codes. pool: see `block_steps`.
    """
    most, num_codebooks = speech_span(vocabulary), vocabulary.num_codebooks(SPEECH)
    begin, end = (vocabulary.structure_id(names[SPEECH]) for names in (BEGIN, END))
    ids = np.append(prompt, begin)
    free = None if unconditional is None else np.append(unconditional, begin)
    left, shown = max_codes, len(prompt)
    while True:
        sizes = range(num_codebooks, max(num_codebooks, min(most, left)) + 1, num_codebooks)
        header = np.zeros(0, dtype=np.int64)
        for step in generate_steps(
            model,
            vocabulary,
            [ids],
            max_ids=HEADER + most + 1,
            allow=(SPEECH,),
            shapes={SPEECH: [(size,) for size in sizes]},
            stop="header",
            ends=ends,
            sampling=sampling,
            generators=[generator],
            unconditional=None if free is None else [free],
            pool=pool,
        ):
            header = np.append(header, np.array(step.ids))  # one sample, which steps until it stops
            yield None
        ids = np.append(ids, header)
        size = vocabulary.size_of(int(header[-1]))
        if size is None:  # one of `ends`: nothing more to say
            yield ids[shown:]
            return
        free = None if free is None else np.append(free, header)
        options = {
            "modality": SPEECH,
            "length": size,
            "sampling": sampling,
            "generators": [generator],
            "unconditional": None if free is None else [free],
        }
        if denoising is None:
            steps = []
            for step in block_steps(model, vocabulary, [ids], pool=pool, **options):
                steps.append(step)
                yield None
            codes = torch.cat(steps).cpu().numpy()
        else:
            options["denoising"] = denoising.fit(size)
            codes = np.zeros(0, dtype=np.int64)
            for passed in denoise_passes(model, vocabulary, [ids], **options):
                [codes] = passed.codes
                yield None
        ids = np.concatenate([ids, codes, [end]])
        free = None if free is None else np.concatenate([free, codes, [end]])
        left -= size
        yield ids[shown:]
        shown = len(ids)
        if left <= 0:
            return
