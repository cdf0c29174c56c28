"""How a document becomes a stream: the order of its segments, what stands between and around them.

Training and evaluation lay documents out differently, and nothing else may: the model sees in
training what it is asked for at inference. `<null>` stands where a condition was dropped, so that
guidance has an unconditional branch `<bod> <null> <boi> ...`. What is said here of one document,
`blocks` does to many at once.
"""

import numpy as np

from mmpt.data.draws import draw
from mmpt.data.tokens import EncodedDocument
from mmpt.stream import Segment, Stream, StreamBuilder
from mmpt.vocab import MEDIA, NUM_SIZES, Modality, Vocabulary

MAX_SPEECH_SPAN = 26  # frames; speech is streamed in blocks of about two seconds


def to_stream(
    document: EncodedDocument,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    separator: np.ndarray,
    condition_drop: float = 0.1,
) -> Stream:
    """`<bod>` segments... `<eod>`; segments of a document of order "any" are permuted by `rng`.

    With probability `condition_drop` it is `<bod> <null>` one random segment `<eod>` instead; a
    document of fixed order then keeps one of its media, or all of it when it is text alone.
    `separator` (text codes) stands between adjacent text segments. `<bod>` and `<null>` have
    weight 0: nothing predicts them.
    """
    media = [segment for segment in document.segments if segment.modality in MEDIA]
    free, num = document.order == "any", len(document.segments)
    places, kept = draw(rng, num, num if free else len(media), free, condition_drop)
    segments = [document.segments[place] for place in places]
    builder = StreamBuilder(vocabulary).structure("<bod>", weight=0.0)
    if kept is not None:
        builder.structure("<null>", weight=0.0)
        segments = [(segments if free else media)[kept]]
    write_segments(builder, segments, separator)
    return builder.structure("<eod>").build()


def to_conditioned_stream(
    document: EncodedDocument,
    vocabulary: Vocabulary,
    target: Modality,
    *,
    separator: np.ndarray,
    condition_from: EncodedDocument | None = None,
) -> Stream:
    """All segments of other media first, in file order, then those of `target`: for evaluation.

    The condition may come from another document (the shuffled control). Only the target's text ids
    or codes have weight 1; begin, size and end ids and separators have 0, because they say nothing
    about the content and would make easy ids look like skill.
    """
    source = condition_from or document
    condition = [segment for segment in source.segments if segment.modality != target]
    builder = StreamBuilder(vocabulary).structure("<bod>", weight=0.0)
    write_segments(builder, condition, separator, weight=0.0)
    targets = [segment for segment in document.segments if segment.modality == target]
    first = len(builder.build())
    write_segments(builder, targets, separator, weight=1.0, separator_weight=0.0)
    stream = builder.structure("<eod>", weight=0.0).build()
    if target != Modality.TEXT:
        stream.loss_weight[first:] = stream.modality[first:] == target
    return stream


def write_segments(
    builder: StreamBuilder,
    segments: list[Segment],
    separator: np.ndarray,
    *,
    weight: float = 1.0,
    separator_weight: float | None = None,
) -> None:
    previous = None
    for modality, codes in segments:
        if modality == Modality.TEXT:
            if previous == Modality.TEXT:
                builder.text(separator, weight=weight if separator_weight is None else 0.0)
            builder.text(codes, weight=weight)
        elif modality == Modality.SPEECH:
            most = speech_span(builder.vocabulary)
            for start in range(0, len(codes), most):
                builder.media(modality, codes[start : start + most], weight=weight)
        else:
            builder.media(modality, codes, weight=weight)
        previous = modality


def speech_span(vocabulary: Vocabulary) -> int:
    """The most ids of one span of speech: whole frames, 26 or as many as a size id can say."""
    num_codebooks = vocabulary.num_codebooks(Modality.SPEECH)
    return num_codebooks * min(MAX_SPEECH_SPAN, NUM_SIZES // num_codebooks)
