"""The inference API: parts go in, parts come out.

    import mmpt
    model = mmpt.load("runs/quickstart/model")
    model("red apple", to="image", seed=0)[0].save("apple.png")

`Pipeline.stream` yields typed events while it works. Every result records what is needed to make
it again. Each sample has its own generator, so a batch gives what its singles give.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError, write_atomic
from mmpt.data.layout import write_segments
from mmpt.decode.ar import generate_block, generate_steps
from mmpt.decode.dida import denoise_passes
from mmpt.decode.sampling import Sampling
from mmpt.decode.speech import speak
from mmpt.model.transformer import Decoder
from mmpt.parts import Part, Text, Video, load_part
from mmpt.processor import Processor
from mmpt.results import Event, Medium, Method, PartDone, Preview, Result, Settings, TextDelta
from mmpt.stream import Segment, StreamBuilder, parse
from mmpt.vocab import MEDIA, Modality, Vocabulary

CODES_PER_SECOND = 12.5  # of speech


class Pipeline:
    """A model with its codecs. `device` follows the model."""

    def __init__(self, model: Decoder, processor: Processor, *, fingerprint: str = "") -> None:
        self.model = model.eval()
        self.processor = processor
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "Pipeline":
        """Open a model folder: model.safetensors, config.json, vocabulary.json, processor.json."""
        folder = Path(folder)
        try:
            settings = json.loads((folder / "processor.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{folder} is no model folder (processor.json: {error})") from None
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        processor = Processor.load(
            settings["tokenizers"], vocabulary=vocabulary, max_side=settings["max_side"]
        )
        model = Decoder.load(folder, vocabulary=vocabulary).to(device)
        return cls(model, processor, fingerprint=settings.get("model_fingerprint", ""))

    def __call__(
        self,
        *parts: Part | str,
        to: Medium | None = None,
        begin: Video | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Result:
        """Answer parts (a str is Text) with a part of medium `to`; without it, the model decides.

        begin: a clip of 1 + 4 n frames that the answer continues. settings: the fields of
        `Settings`. Raises UserError in one line for what cannot be done.
        """
        *_, result = self.stream(*parts, to=to, begin=begin, seed=seed, **settings)
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
        return _last(
            self._run([self._segments(p) for p in prompts], to, list(seeds), _settings(settings))
        )

    def stream(
        self,
        *parts: Part | str,
        to: Medium | None = None,
        begin: Video | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Iterator[Event]:
        """As a call, but yields events while it works; the last one is the Result."""
        chosen = _settings(settings)
        if begin is not None and to != "video":
            raise UserError("begin is a clip to continue; it needs to='video'")
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
    ) -> Iterator[list[Event]]:
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
        if settings.decoder == "dida" and not any(
            g.noisy for g in self.model.config.groups.values()
        ):
            raise UserError("this model was never adapted; run mmpt adapt, or use decoder='ar'")
        if modality == Modality.SPEECH:
            yield from self._speak(builders, free, seeds, generators, settings)
            return
        shape, given = self._shape(modality, settings), np.zeros((0, 1, 1), dtype=np.int64)
        if begin is not None:
            given = self.processor.encode_parts([begin])[0].codes
            if given.shape[1:] != shape[1:] or len(given) >= shape[0]:
                raise UserError(
                    f"begin has codes {given.shape}, the clip to make {shape}; give less than "
                    f"{settings.frames} of {settings.height} x {settings.width} pixels"
                )
        for builder in [*builders, *(free or [])]:
            builder.header(modality, shape)
        yield from self._fill(builders, free, modality, shape, given, seeds, generators, settings)

    def _shape(self, modality: Modality, settings: Settings) -> tuple[int, ...]:
        codec = self.processor.media.get(modality)
        if codec is None:
            raise UserError(f"this model has no {modality.name.lower()} tokenizer")
        sides = (settings.height // 8, settings.width // 8)
        if settings.height % 8 or settings.width % 8:
            raise UserError(f"{settings.height} x {settings.width} pixels; use multiples of 8")
        if modality == Modality.IMAGE:
            return sides
        if (settings.frames - 1) % 4:
            raise UserError(f"frames = {settings.frames}; use 1 + 4 n, such as 17")
        return (1 + (settings.frames - 1) // 4, *sides)

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
    ) -> Iterator[list[Event]]:
        vocabulary = self.processor.vocabulary
        start = vocabulary.range_of(modality).start
        before = given.reshape(-1) + start
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
                self.model, vocabulary, prompts, num_passes=settings.num_passes, **options
            ):
                codes = preview.codes
                shown = self._finished(modality, shape, before, codes, start)
                yield [Preview(part, preview.done, preview.total) for part in shown]
        parts = self._finished(modality, shape, before, codes, start)
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
        start: int,
    ) -> list[Part]:
        # a video that is not finished shows the latent frames that it has
        per_frame, parts = int(np.prod(shape[-2:])), []
        for row in ids:
            codes = np.concatenate([before, row]) - start
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
        prompts = [builder.build().ids for builder in builders]
        codec, written = self.processor.text, [[] for _ in prompts]
        shown = ["" for _ in prompts]
        for step in generate_steps(
            self.model,
            self.processor.vocabulary,
            prompts,
            max_ids=settings.max_ids,
            sampling=_sampling(settings),
            generators=generators,
            allow=(Modality.TEXT,),
            unconditional=None if free is None else [b.build().ids for b in free],
        ):
            events: list[Event] = []
            for row, token in enumerate(step.ids):
                if token is not None and token < self.processor.vocabulary.num_text:
                    written[row].append(token)
                text = codec.decode(torch.tensor(written[row], dtype=torch.int64)[:, None])
                ready = text if not text.endswith("\ufffd") else shown[row]
                events.append(TextDelta(ready[len(shown[row]) :]))
                shown[row] = ready
            yield events
        parts = [
            Text(codec.decode(torch.tensor(ids, dtype=torch.int64)[:, None])) for ids in written
        ]
        yield [PartDone(part) for part in parts]
        yield [
            self._result([part], seed, settings, np.concatenate([prompt, np.array(ids, np.int64)]))
            for part, seed, prompt, ids in zip(parts, seeds, prompts, written, strict=True)
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
                max_codes=max(1, round(settings.max_seconds * CODES_PER_SECOND)),
                num_passes=settings.num_passes if settings.decoder == "dida" else None,
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

    @torch.inference_mode()
    def _continue(self, segments: list[Segment], seed: int, settings: Settings) -> Iterator[Event]:
        """Let the model decide what comes: text and media, until it ends the document."""
        vocabulary = self.processor.vocabulary
        prompt = self._prompt(segments).build().ids
        free = [self._no_condition().build().ids] if settings.guidance != 1 else None
        steps = generate_steps(
            self.model,
            vocabulary,
            [prompt],
            max_ids=settings.max_ids,
            sampling=_sampling(settings),
            generators=[torch.Generator().manual_seed(seed)],
            shapes={
                modality: [self._shape(modality, settings)]
                for modality in (Modality.IMAGE, Modality.VIDEO)
                if vocabulary.has(modality)
            },
            unconditional=free,
        )
        ids = _collect(steps)
        parts = self.processor.decode_segments(list(parse(ids, vocabulary)))
        for part in parts:
            yield PartDone(part)
        yield self._result(parts, seed, settings, np.concatenate([prompt, ids]))

    def _result(self, parts: list[Part], seed: int, settings: Settings, ids: np.ndarray) -> Result:
        vocabulary = self.processor.vocabulary.fingerprint
        return Result(parts, seed, settings, self.fingerprint, vocabulary, ids)


def save_model(
    model: Decoder, processor: Processor, folder: str | Path, tokenizers: Sequence[str]
) -> None:
    """Write a model folder that `Pipeline.load` opens."""
    folder = Path(folder)
    model.save(folder)
    processor.vocabulary.save(folder / "vocabulary.json")
    settings = {"tokenizers": list(tokenizers), "max_side": processor.max_side}
    write_atomic(folder / "processor.json", json.dumps(settings, indent=1) + "\n")


def generate(
    model: Path,
    parts: list[str],
    *,
    out: Path | None = None,
    to: Medium = "image",
    seed: int = 0,
    decoder: Method = "ar",
    guidance: float = 1.0,
    temperature: float = 1.0,
    num_passes: int = 8,
) -> dict:
    """Generate a part of medium `to` from PARTS: texts, or files such as cat.png and hello.wav."""
    pipeline = Pipeline.load(model)
    loaded = [load_part(text) if Path(text).is_file() else Text(text) for text in parts]
    result = pipeline(
        *loaded,
        to=to,
        seed=seed,
        decoder=decoder,
        guidance=guidance,
        temperature=temperature,
        num_passes=num_passes,
    )
    [part] = result
    if out is not None:
        part.save(out)
    elif not isinstance(part, Text):
        raise UserError(f"the result is {to}; say where to save it with --out FILE")
    shown = {"text": part.text} if isinstance(part, Text) else {"out": str(out)}
    return shown | result.provenance()


def _settings(values: dict[str, Any]) -> Settings:
    unknown = set(values) - set(Settings.__dataclass_fields__)
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise UserError(f"unknown setting {sorted(unknown)[0]!r}; known: {known}")
    return Settings(**values)


def _sampling(settings: Settings) -> Sampling:
    return Sampling(
        temperature=settings.temperature, top_p=settings.top_p, guidance=settings.guidance
    )


def _open(builders: list[StreamBuilder], before: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([builder.build().ids, before]) for builder in builders]


def _collect(steps: Iterator) -> np.ndarray:
    return np.array([step.ids[0] for step in steps if step.ids[0] is not None], dtype=np.int64)


def _last(events: Iterator[list[Event]]) -> list[Result]:
    *_, results = events
    return [result for result in results if isinstance(result, Result)]
