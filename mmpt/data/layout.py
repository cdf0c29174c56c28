"""How a document becomes a stream: the order of its segments, what stands between and around them.

Training and evaluation lay documents out differently, and nothing else may: the model sees in
training what it is asked for at inference. `<null>` stands where a condition was dropped, so that
guidance has an unconditional branch `<bod> <null> <boi> ...`. What is said here of one document,
`blocks` does to many at once.
"""

from itertools import groupby
from operator import itemgetter

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
    masked_prompts: bool = False,
) -> Stream:
    """`<bod>` segments... `<eod>`; segments of a document of order "any" are permuted by `rng`.

    With probability `condition_drop` it is `<bod> <null>` one random segment `<eod>` instead; a
    document of fixed order then keeps one of its media, or all of it when it is text alone.
    `separator` (text codes) stands between adjacent text segments. `<bod>` and `<null>` have
    weight 0: nothing predicts them.

    Each turn of a conversation begins by `<user>` or `<assistant>`. What is kept alone is one turn
    of the assistant, behind `<null>` without that id. masked_prompts: what the user says has weight
    0, and so has what makes it the assistant's turn; that it is the user's again has not, for this
    is how an answer ends.
    """
    turns = turns_of(document)
    media = [[segment] for segment in document.segments if segment.modality in MEDIA]
    answers = [segments for role, segments in turns if role == "assistant"]
    free, num = document.order == "any", len(document.segments)
    candidates = answers if document.roles else media
    places, kept = draw(rng, num, num if free else len(candidates), free, condition_drop)
    segments = [document.segments[place] for place in places]
    builder = StreamBuilder(vocabulary).structure("<bod>", weight=0.0)
    end_weight = 1.0
    if kept is not None:
        builder.structure("<null>", weight=0.0)
        write_segments(builder, [segments[kept]] if free else candidates[kept], separator)
    elif document.roles:
        prompt_weight = 0.0 if masked_prompts else 1.0
        write_turns(builder, turns, separator, prompt_weight=prompt_weight)
        end_weight = prompt_weight if document.roles[-1] == "user" else 1.0
    else:
        write_segments(builder, segments, separator)
    return builder.structure("<eod>", weight=end_weight).build()


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


def turns_of(document: EncodedDocument) -> list[tuple[str, list[Segment]]]:
    """Who says what, in order; nothing where the document is no conversation."""
    said = zip(document.roles, document.segments, strict=False)
    return [(role, [s for _, s in turn]) for role, turn in groupby(said, key=itemgetter(0))]


def write_turns(
    builder: StreamBuilder,
    turns: list[tuple[str, list[Segment]]],
    separator: np.ndarray,
    *,
    prompt_weight: float = 1.0,
) -> None:
    """Append turns of a conversation to one that stands at its beginning.

    prompt_weight: of what is given when an answer is asked for, see `to_stream`.
    """
    for number, (role, segments) in enumerate(turns):
        ends_an_answer = number > 0 and role == "user"
        builder.structure(f"<{role}>", weight=1.0 if ends_an_answer else prompt_weight)
        weight = prompt_weight if role == "user" else 1.0
        write_segments(builder, segments, separator, weight=weight)


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
