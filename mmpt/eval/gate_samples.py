"""What the quality gate compares: held-out prompts, and samples that are drawn once and kept.

A sample is a file of its own under a folder of its model and settings. What is there is not drawn
again, so a gate that was stopped goes on, and one with other settings draws only what is new.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from mmpt.config import UserError, write_atomic
from mmpt.data.layout import write_segments
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument
from mmpt.parts import Part, Text, Video
from mmpt.pipeline import Pipeline
from mmpt.processor import Processor
from mmpt.progress import Bar
from mmpt.results import Medium, Result, Settings
from mmpt.stream import Segment, Stream, StreamBuilder, parse
from mmpt.tokenizers.video import GROUP
from mmpt.vocab import END, Modality, Vocabulary

BATCH = 8  # samples that are drawn together


@dataclass(frozen=True, eq=False)
class Prompt:
    """Texts, for a video its first frames, and what the document really goes on with.

    begin: int (frames, height, width), the codes of the frames that are given.
    """

    key: str
    texts: tuple[str, ...]
    condition: list[Segment]
    real: list[Segment]
    clip: Video | None = None
    begin: np.ndarray | None = None

    @property
    def num_given(self) -> int:
        """Latent frames that are given."""
        return 0 if self.begin is None else len(self.begin)

    def seed(self, number: int, seed: int) -> int:
        """Of sample `number`: prompts do not share random numbers, systems do."""
        return zlib.crc32(f"{seed}/{self.key}/{number}".encode())


@dataclass(frozen=True, eq=False)
class Answer:
    """The spans that answer a prompt, in a video behind the codes that were given.

    place: which prompt it was drawn for, by number.
    """

    prompt: Prompt
    segments: list[Segment]
    place: int
    seconds: float = 0.0

    @property
    def codes(self) -> np.ndarray:
        """int (n,): those that are its own, not given."""
        if self.prompt.begin is not None:
            return self.segments[0].codes[self.prompt.num_given :].reshape(-1)
        return np.concatenate([segment.codes.reshape(-1) for segment in self.segments])

    def told(self, other: Prompt) -> "Answer":
        """The same answer, as if it had been to another prompt."""
        segments = self.segments
        if other.begin is not None:
            [(modality, codes)] = segments
            own = codes[self.prompt.num_given :]
            segments = [Segment(modality, np.concatenate([other.begin, own]))]
        return Answer(other, segments, self.place)

    def stream(self, vocabulary: Vocabulary, separator: np.ndarray) -> Stream:
        """Prompt and answer; the answer's own codes have weight 1, all else 0."""
        builder = StreamBuilder(vocabulary).structure("<bod>")
        write_segments(builder, self.prompt.condition, separator)
        for modality, codes in self.segments:
            builder.media(modality, codes)
        stream = builder.build()
        stream.loss_weight[:] = 0
        for span in stream.spans:
            given = self.prompt.num_given * span.grid[1] * span.grid[2]
            stream.loss_weight[span.start + given : span.start + span.length] = 1
        return stream


class System:
    """All answers of one way to answer, as many to each prompt."""

    def __init__(self, name: str, answers: Sequence[Answer], processor: Processor) -> None:
        self.name, self.answers, self.processor = name, list(answers), processor
        self.num_prompts = 1 + max(answer.place for answer in answers)

    @cached_property
    def parts(self) -> list[Part]:
        """Each answer as a picture, a clip or a sound."""
        shown = Bar(self.answers, desc=f"decode codes: {self.name}", leave=False)
        return [self.processor.decode_segments(answer.segments)[0] for answer in shown]

    def shuffled(self) -> "System":
        """The same answers beside other prompts, each by turns beside those that follow its own."""
        prompts = {answer.place: answer.prompt for answer in self.answers}
        seen: dict[int, int] = {}
        others = []
        for answer in self.answers:
            seen[answer.place] = seen.get(answer.place, 0) + 1
            others.append(prompts[(answer.place + seen[answer.place]) % len(prompts)])
        answers = [a.told(other) for a, other in zip(self.answers, others, strict=True)]
        made = System("shuffled prompts", answers, self.processor)
        if all(answer.prompt.begin is None for answer in answers):
            made.parts = self.parts  # decoded already
        return made

    def by_prompt(self, values: ArrayLike) -> np.ndarray:
        """float (prompts,): the sums of a value of each answer."""
        places = [answer.place for answer in self.answers]
        return np.bincount(places, weights=np.asarray(values), minlength=self.num_prompts)


def find_prompts(
    documents: Sequence[EncodedDocument],
    processor: Processor,
    medium: Medium,
    *,
    count: int,
    given_frames: int,
) -> list[Prompt]:
    """At most `count` prompts of held-out documents, one of each idea, in the order of a hash.

    Views of one idea are asked for by all their texts, pages by the text before their first
    medium; speech only by its transcript, where a document holds nothing else. Videos go on from
    their first `given_frames` frames.
    """
    if medium == "video" and ((given_frames - 1) % GROUP or given_frames < 1):
        raise UserError(f"given_frames = {given_frames}; use 1 + {GROUP} n, such as 9")
    chosen: dict[str, EncodedDocument] = {}
    for document in sorted(documents, key=lambda each: zlib.crc32(each.key.encode())):
        if is_heldout(document.base) and _asks_for(document, Modality[medium.upper()]):
            chosen.setdefault(document.base, document)
    return [
        _prompt(document, processor, Modality[medium.upper()], given_frames)
        for document in list(chosen.values())[:count]
    ]


def real_system(prompts: Sequence[Prompt], processor: Processor) -> System:
    """What the documents go on with, through the codec."""
    answers = [Answer(prompt, prompt.real, place) for place, prompt in enumerate(prompts)]
    return System("real", answers, processor)


def draw_system(
    name: str,
    pipeline: Pipeline,
    settings: Settings,
    prompts: Sequence[Prompt],
    medium: Medium,
    *,
    folder: Path,
    num_samples: int,
    seed: int,
) -> System:
    """`num_samples` answers to each prompt, those in `folder` read and the others drawn."""
    about = json.dumps([asdict(settings), pipeline.fingerprint, medium], sort_keys=True)
    folder = folder / medium / f"{name}-{_digest(about)}"
    asked = [(place, number) for place in range(len(prompts)) for number in range(num_samples)]
    seeds = {(p, n): prompts[p].seed(n, seed) for p, n in asked}
    files = {(p, n): folder / _name(prompts[p], seeds[p, n]) for p, n in asked}
    missing = [which for which in asked if not files[which].is_file()]
    if missing:
        write_atomic(folder / "settings.json", about)
    with Bar(total=len(missing), desc=f"draw {medium}: {name}", unit="sample") as progress:
        for start in range(0, len(missing), BATCH):
            batch, began = missing[start : start + BATCH], time.perf_counter()
            results = _draw(
                pipeline,
                [prompts[p] for p, _ in batch],
                medium,
                [seeds[w] for w in batch],
                settings,
            )
            seconds = (time.perf_counter() - began) / len(batch)
            for which, result in zip(batch, results, strict=True):
                ids = _answer_ids(result, prompts[which[0]], pipeline.processor, medium)
                kept = {"seed": seeds[which], "seconds": round(seconds, 4), "ids": ids.tolist()}
                write_atomic(files[which], json.dumps(kept))
            progress.update(len(batch))
    answers = [_read(files[which], prompts[which[0]], which[0], pipeline) for which in asked]
    return System(name, answers, pipeline.processor)


def _asks_for(document: EncodedDocument, modality: Modality) -> bool:
    kinds = [segment.modality for segment in document.segments]
    if modality not in kinds or Modality.TEXT not in kinds:
        return False
    if modality == Modality.SPEECH:
        return sorted(kinds) == [Modality.TEXT, Modality.SPEECH]
    if document.order == "any":
        return True
    return set(kinds[: kinds.index(modality)]) == {Modality.TEXT}


def _prompt(
    document: EncodedDocument, processor: Processor, modality: Modality, given_frames: int
) -> Prompt:
    segments = document.segments
    first = next(i for i, segment in enumerate(segments) if segment.modality == modality)
    before = segments if document.order == "any" else segments[:first]
    words = processor.decode_segments([_whole(s) for s in before if s.modality == Modality.TEXT])
    texts = [part for part in words if isinstance(part, Text) and part.text]
    condition = processor.encode_parts(texts)
    real = _spans(segments[first], processor)
    if modality != Modality.VIDEO:
        return Prompt(document.key, tuple(part.text for part in texts), condition, real)
    [clip] = processor.decode_segments(real)
    assert isinstance(clip, Video)
    if given_frames >= len(clip.frames):
        raise UserError(
            f"given_frames = {given_frames}, but {document.key} has {len(clip.frames)} frames; "
            "give fewer"
        )
    clip = Video(clip.frames[:given_frames], clip.fps)
    begin = processor.encode_parts([clip])[0].codes
    # the real continuation stands behind what is given to all
    real = [Segment(modality, np.concatenate([begin, real[0].codes[len(begin) :]]))]
    return Prompt(document.key, tuple(part.text for part in texts), condition, real, clip, begin)


def _spans(segment: Segment, processor: Processor) -> list[Segment]:
    """As the layout cuts it: long speech is several spans."""
    builder = StreamBuilder(processor.vocabulary)
    write_segments(builder, [_whole(segment)], processor.separator)
    return list(parse(builder.build().ids, processor.vocabulary))


def _whole(segment: Segment) -> Segment:
    return Segment(segment.modality, np.asarray(segment.codes, dtype=np.int64))


def _draw(
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    medium: Medium,
    seeds: Sequence[int],
    settings: Settings,
) -> list[Result]:
    options = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if medium == "video":
        return [
            pipeline(*prompt.texts, to=medium, begin=prompt.clip, seed=seed, **options)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    return pipeline.batch([p.texts for p in prompts], to=medium, seeds=seeds, **options)


def _answer_ids(result: Result, prompt: Prompt, processor: Processor, medium: Medium) -> np.ndarray:
    """The ids behind the prompt, as whole spans."""
    builder = StreamBuilder(processor.vocabulary).structure("<bod>")
    write_segments(builder, prompt.condition, processor.separator)
    ids = result.ids[len(builder.build()) :]
    if medium == "speech":  # which ends its spans itself
        return ids
    return np.append(ids, processor.vocabulary.structure_id(END[Modality[medium.upper()]]))


def _read(path: Path, prompt: Prompt, place: int, pipeline: Pipeline) -> Answer:
    try:
        kept = json.loads(path.read_text())
        ids = np.array(kept["ids"], dtype=np.int64)
        segments = [
            segment
            for segment in parse(ids, pipeline.processor.vocabulary)
            if segment.modality == prompt.real[0].modality
        ]
        return Answer(prompt, segments, place, float(kept["seconds"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no sample: {error}; remove it to draw it again") from None


def _name(prompt: Prompt, seed: int) -> str:
    begin = [] if prompt.begin is None else prompt.begin.tolist()
    return f"{_digest(json.dumps([prompt.key, prompt.texts, begin, seed]))}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def mean_seconds(systems: Sequence[System]) -> Iterator[tuple[str, float]]:
    """Name and seconds a sample, of those that were drawn."""
    for system in systems:
        yield system.name, float(np.mean([answer.seconds for answer in system.answers]))
