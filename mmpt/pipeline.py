"""The inference API: parts go in, parts come out.

    import mmpt
    model = mmpt.load("runs/quickstart/model")
    model("red apple", to="image", seed=0)[0].save("apple.png")

`Pipeline.stream` yields typed events while it works. Every result records what is needed to make
it again. Each sample has its own generator, so a batch gives what its singles give.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError, from_dict
from mmpt.data.layout import speech_span, write_segments
from mmpt.decode.ar import generate_block, generate_steps
from mmpt.decode.denoise import denoise_block, denoise_passes
from mmpt.decode.sampling import Sampling
from mmpt.decode.speech import speak
from mmpt.decode.text import denoise_text
from mmpt.edit import Edit
from mmpt.model.transformer import Decoder
from mmpt.model.weights import fingerprint
from mmpt.parts import Part, Text, Video
from mmpt.process import pick_device
from mmpt.processor import Processor
from mmpt.results import Event, Medium, PartDone, Preview, Result, Settings, TextDelta
from mmpt.stream import Segment, StreamBuilder, parse
from mmpt.tokenizers.video import GROUP
from mmpt.train.checkpoint import find_model
from mmpt.vocab import MEDIA, Modality, Vocabulary
from mmpt.writer import TextWriter, blocks_of_text


class Pipeline:
    """A model with its codecs. `device` follows the model."""

    def __init__(self, model: Decoder, processor: Processor, *, fingerprint: str = "") -> None:
        self.model = model.eval()
        self.processor = processor
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "Pipeline":
        """Open a model folder or a run: the model, its vocabulary and its tokenizers."""
        folder = find_model(folder)
        processor = Processor.from_folder(folder)
        model = Decoder.load(folder, vocabulary=processor.vocabulary).to(pick_device(device))
        return cls(model, processor, fingerprint=fingerprint(folder))

    def __call__(
        self,
        *parts: Part | str,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Result:
        """Answer parts (a str is Text) with a part of medium `to`; without it, the model decides.

        begin: a clip of 1 + 4 n frames that the answer continues. edit: a part of which a region is
        made anew, by the parallel decoder. settings: the fields of `Settings`. Raises UserError in
        one line for what cannot be done.
        """
        *_, result = self.stream(*parts, to=to, begin=begin, edit=edit, seed=seed, **settings)
        assert isinstance(result, Result)
        return result

    def batch(
        self,
        prompts: Sequence[Sequence[Part | str]],
        *,
        to: Medium,
        seeds: Sequence[int],
        **settings: Any,
    ) -> list[Result]:
        """Many answers of one medium; prompt i with seed i gives what a single call gives."""
        if len(prompts) != len(seeds):
            raise UserError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        segments = [self._segments(p) for p in prompts]
        return _last(self._run(segments, to, list(seeds), _settings(settings), show=False))

    def stream(
        self,
        *parts: Part | str,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Iterator[Event]:
        """As a call, but yields events while it works; the last one is the Result."""
        if begin is not None and to != "video":
            raise UserError("begin is a clip to continue; it needs to='video'")
        if edit is not None:
            chosen = _settings({"decoder": "dida"} | settings)
            yield from self._edit(self._segments(parts), edit, to, begin, seed, chosen)
            return
        chosen = _settings(settings)
        if to is None:
            yield from self._continue(self._segments(parts), seed, chosen)
            return
        for event in self._run([self._segments(parts)], to, [seed], chosen, begin):
            yield event[0]

    def _segments(self, parts: Sequence[Part | str]) -> list[Segment]:
        typed = [Text(part) if isinstance(part, str) else part for part in parts]
        return self.processor.encode_parts(
            [p for p in typed if not (isinstance(p, Text) and not p.text)]
        )

    def _prompt(self, segments: Sequence[Segment]) -> StreamBuilder:
        builder = StreamBuilder(self.processor.vocabulary).structure("<bod>")
        write_segments(builder, list(segments), self.processor.separator)
        return builder

    def _no_condition(self) -> StreamBuilder:
        return StreamBuilder(self.processor.vocabulary).structure("<bod>", "<null>")

    @torch.inference_mode()
    def _run(
        self,
        prompts: list[list[Segment]],
        to: Medium,
        seeds: list[int],
        settings: Settings,
        begin: Video | None = None,
        *,
        show: bool = True,
    ) -> Iterator[list[Event]]:
        """show: previews, which have to be decoded."""
        modality = Modality[to.upper()] if to.upper() in Modality.__members__ else None
        if modality is None:
            raise UserError(f"to = {to!r}; choose text, image, video or speech")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        builders = [self._prompt(segments) for segments in prompts]
        guided = settings.guidance != 1
        free = [self._no_condition() for _ in prompts] if guided else None
        if modality == Modality.TEXT:
            yield from self._write_text(builders, free, seeds, generators, settings)
            return
        self._check_adapted(settings)
        if modality == Modality.SPEECH:
            yield from self._speak(builders, free, seeds, generators, settings)
            return
        shape, given = self._shape(modality, settings), np.zeros((0, 1, 1), dtype=np.int64)
        if begin is not None:
            if (len(begin.frames) - 1) % GROUP:
                raise UserError(
                    f"begin has {len(begin.frames)} frames; give 1 + {GROUP} n, such as 9"
                )
            given = self.processor.encode_parts([begin])[0].codes
            if given.shape[1:] != shape[1:] or len(given) >= shape[0]:
                raise UserError(
                    f"begin has codes {given.shape}, the clip to make {shape}; give less than "
                    f"{settings.frames} of {settings.height} x {settings.width} pixels"
                )
        for builder in [*builders, *(free or [])]:
            builder.header(modality, shape)
        yield from self._fill(
            builders, free, modality, shape, given, seeds, generators, settings, show=show
        )

    @torch.inference_mode()
    def _edit(
        self,
        segments: list[Segment],
        edit: Edit,
        to: Medium | None,
        begin: Video | None,
        seed: int,
        settings: Settings,
    ) -> Iterator[Event]:
        """The codes that are made anew, between those that are held."""
        if settings.decoder != "dida" or begin is not None:
            raise UserError("an edit needs decoder='dida', and no begin")
        self._check_adapted(settings)
        segment, redo = edit.encode(self.processor)
        modality = segment.modality
        if to not in (None, modality.name.lower()):
            raise UserError(f"the edit is of {modality.name.lower()}; leave out to = {to!r}")
        held = np.where(redo, -1, self.processor.vocabulary.ids_of(modality, segment.codes))
        builder, generator = self._prompt(segments), torch.Generator().manual_seed(seed)
        free = self._no_condition() if settings.guidance != 1 else None
        if modality == Modality.SPEECH:
            yield from self._edit_speech(builder, free, held, seed, generator, settings)
            return
        for each in (builder, free):
            if each is not None:
                each.header(modality, held.shape)
        for event in self._fill(
            [builder],
            None if free is None else [free],
            modality,
            held.shape,
            np.zeros((0, 1, 1), dtype=np.int64),
            [seed],
            [generator],
            settings,
            held=[held.reshape(-1)],
        ):
            yield event[0]

    def _edit_speech(
        self,
        builder: StreamBuilder,
        free: StreamBuilder | None,
        held: np.ndarray,
        seed: int,
        generator: torch.Generator,
        settings: Settings,
    ) -> Iterator[Event]:
        """Span by span; those behind a stretch are not seen by it."""
        vocabulary, size = self.processor.vocabulary, speech_span(self.processor.vocabulary)
        pieces = np.split(held, range(size, len(held), size))
        for span in pieces:
            both = [builder] if free is None else [builder, free]
            prompts = [
                np.concatenate([each.build().ids, _header(vocabulary, len(span))]) for each in both
            ]
            [ids] = denoise_block(
                self.model,
                vocabulary,
                prompts[:1],
                modality=Modality.SPEECH,
                length=len(span),
                sampling=_sampling(settings),
                generators=[generator],
                denoising=settings,
                unconditional=prompts[1:] or None,
                held=[span],
            )
            codes = vocabulary.codes_of(Modality.SPEECH, ids)
            assert codes is not None  # decoders draw legal ids
            for each in both:
                each.media(Modality.SPEECH, codes)
        ids = builder.build().ids
        spans = [s for s in parse(ids, vocabulary) if s.modality == Modality.SPEECH]
        parts = self.processor.decode_segments(spans[-len(pieces) :])
        yield PartDone(parts[0])
        yield self._result(parts, seed, settings, ids)

    def _check_adapted(self, settings: Settings) -> None:
        adapted = any(group.noisy for group in self.model.config.groups.values())
        if settings.decoder == "dida" and not adapted:
            raise UserError("this model was never adapted; run mmpt adapt, or use decoder='ar'")

    def _shape(self, modality: Modality, settings: Settings) -> tuple[int, ...]:
        codec = self.processor.media.get(modality)
        if codec is None:
            raise UserError(f"this model has no {modality.name.lower()} tokenizer")
        factor = codec.factor
        # the last side counts ids: a cell has one of each codebook
        sides = (settings.height // factor, settings.width // factor * codec.num_codebooks)
        if settings.height % factor or settings.width % factor:
            raise UserError(
                f"{settings.height} x {settings.width} pixels; use multiples of {factor}"
            )
        if modality == Modality.IMAGE:
            return sides
        if (settings.frames - 1) % GROUP:
            raise UserError(f"frames = {settings.frames}; use 1 + {GROUP} n, such as 17")
        return (1 + (settings.frames - 1) // GROUP, *sides)

    def _fill(
        self,
        builders: list[StreamBuilder],
        free: list[StreamBuilder] | None,
        modality: Modality,
        shape: tuple[int, ...],
        given: np.ndarray,
        seeds: list[int],
        generators: list[torch.Generator],
        settings: Settings,
        held: list[np.ndarray] | None = None,
        show: bool = True,
    ) -> Iterator[list[Event]]:
        vocabulary = self.processor.vocabulary
        before = vocabulary.ids_of(modality, given.reshape(-1))
        options = {
            "modality": modality,
            "length": int(np.prod(shape)) - len(before),
            "sampling": _sampling(settings),
            "generators": generators,
            "unconditional": None if free is None else _open(free, before),
        }
        prompts = _open(builders, before)
        if settings.decoder == "ar":
            codes = generate_block(self.model, vocabulary, prompts, **options)
        else:
            codes = []
            for preview in denoise_passes(
                self.model, vocabulary, prompts, denoising=settings, held=held, **options
            ):
                codes = preview.codes
                if show:
                    shown = self._finished(modality, shape, before, codes)
                    yield [Preview(part, preview.done, preview.total) for part in shown]
        parts = self._finished(modality, shape, before, codes)
        yield [PartDone(part) for part in parts]
        yield [
            self._result([part], seed, settings, np.concatenate([prompt, ids]))
            for part, seed, prompt, ids in zip(parts, seeds, prompts, codes, strict=True)
        ]

    def _finished(
        self,
        modality: Modality,
        shape: tuple[int, ...],
        before: np.ndarray,
        ids: list[np.ndarray],
    ) -> list[Part]:
        # a video that is not finished shows the latent frames that it has
        per_frame, parts = int(np.prod(shape[-2:])), []
        for row in ids:
            codes = self.processor.vocabulary.codes_of(modality, np.concatenate([before, row]))
            assert codes is not None  # decoders draw legal ids
            grid = (len(codes) // per_frame, *shape[-2:])[-len(shape) :]
            parts += self.processor.decode_segments([Segment(modality, codes.reshape(grid))])
        return parts

    def _write_text(
        self,
        builders: list[StreamBuilder],
        free: list[StreamBuilder] | None,
        seeds: list[int],
        generators: list[torch.Generator],
        settings: Settings,
    ) -> Iterator[list[Event]]:
        vocabulary = self.processor.vocabulary
        prompts = [builder.build().ids for builder in builders]
        writers = [TextWriter(self.processor) for _ in prompts]
        options = {
            "max_ids": settings.max_ids,
            "sampling": _sampling(settings),
            "generators": generators,
            "unconditional": None if free is None else [b.build().ids for b in free],
        }
        if settings.decoder == "dida" and self.model.config.noise.text_block:
            steps = blocks_of_text(
                denoise_text(self.model, vocabulary, prompts, denoising=settings, **options)
            )
        else:
            written = generate_steps(
                self.model, vocabulary, prompts, allow=(Modality.TEXT,), **options
            )
            steps = ([[] if i is None else [i] for i in step.ids] for step in written)
        for new in steps:
            pairs = zip(writers, new, strict=True)
            yield [TextDelta("".join(map(writer.push, ids))) for writer, ids in pairs]
        yield [TextDelta(writer.flush()) for writer in writers]
        parts = [Text(writer.text) for writer in writers]
        yield [PartDone(part) for part in parts]
        rows = zip(parts, seeds, prompts, writers, strict=True)
        yield [
            self._result([part], seed, settings, np.append(prompt, writer.ids).astype(np.int64))
            for part, seed, prompt, writer in rows
        ]

    def _speak(
        self,
        builders: list[StreamBuilder],
        free: list[StreamBuilder] | None,
        seeds: list[int],
        generators: list[torch.Generator],
        settings: Settings,
    ) -> Iterator[list[Event]]:
        """Spans of speech one after another, each as long as the model says, until it ends."""
        results = []
        for row, (builder, seed, generator) in enumerate(
            zip(builders, seeds, generators, strict=True)
        ):
            ids = speak(
                self.model,
                self.processor.vocabulary,
                builder.build().ids,
                max_codes=max(1, round(settings.max_seconds * self._speech_rate())),
                denoising=settings if settings.decoder == "dida" else None,
                sampling=_sampling(settings),
                generator=generator,
                unconditional=None if free is None else free[row].build().ids,
            )
            start = len(builder.build())
            segments = [
                s for s in parse(ids[start:], self.processor.vocabulary) if s.modality in MEDIA
            ]
            parts = self.processor.decode_segments(segments)
            results.append(self._result(parts, seed, settings, ids))
        yield [PartDone(result.parts[0]) for result in results]
        yield list(results)

    def _speech_rate(self) -> float:
        """Codes a second, of all codebooks."""
        codec: Any = self.processor.media[Modality.SPEECH]
        return codec.sample_rate / codec.samples_per_code * codec.num_codebooks

    @torch.inference_mode()
    def _continue(self, segments: list[Segment], seed: int, settings: Settings) -> Iterator[Event]:
        """Let the model decide what comes: text and media, until it ends the document."""
        if settings.decoder != "ar":
            raise UserError("decoder='dida' needs to='image', 'video' or 'speech'")
        vocabulary = self.processor.vocabulary
        prompt = self._prompt(segments).build().ids
        shapes: dict[Modality, list[tuple[int, ...]]] = {
            modality: [self._shape(modality, settings)]
            for modality in (Modality.IMAGE, Modality.VIDEO)
            if vocabulary.has(modality)
        }
        if vocabulary.has(Modality.SPEECH):
            most = speech_span(vocabulary)
            shapes[Modality.SPEECH] = [(length,) for length in range(1, most + 1)]
        writer, ids = TextWriter(self.processor), []
        for step in generate_steps(
            self.model,
            vocabulary,
            [prompt],
            max_ids=settings.max_ids,
            sampling=_sampling(settings),
            generators=[torch.Generator().manual_seed(seed)],
            shapes=shapes,
            unconditional=[self._no_condition().build().ids] if settings.guidance != 1 else None,
        ):
            ids += [token for token in step.ids if token is not None]
            if delta := writer.push(step.ids[0]):
                yield TextDelta(delta)
        new = np.array(ids, dtype=np.int64)
        parts = self.processor.decode_segments(list(parse(new, vocabulary)))
        for part in parts:
            yield PartDone(part)
        yield self._result(parts, seed, settings, np.concatenate([prompt, new]))

    def _result(self, parts: list[Part], seed: int, settings: Settings, ids: np.ndarray) -> Result:
        vocabulary = self.processor.vocabulary.fingerprint
        return Result(parts, seed, settings, self.fingerprint, vocabulary, ids)


def save_model(model: Decoder, processor: Processor, folder: str | Path) -> None:
    """Write a model folder that `Pipeline.load` opens."""
    model.save(folder)
    processor.vocabulary.save(Path(folder) / "vocabulary.json")
    processor.save_settings(folder)


def _settings(values: dict[str, Any]) -> Settings:
    return from_dict(Settings, values, where="settings")


def _sampling(settings: Settings) -> Sampling:
    return Sampling(
        temperature=settings.temperature, top_p=settings.top_p, guidance=settings.guidance
    )


def _header(vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Ids that begin a span of speech."""
    return StreamBuilder(vocabulary).header(Modality.SPEECH, (length,)).build().ids


def _open(builders: list[StreamBuilder], before: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([builder.build().ids, before]) for builder in builders]


def _last(events: Iterator[list[Event]]) -> list[Result]:
    *_, results = events
    return [result for result in results if isinstance(result, Result)]
