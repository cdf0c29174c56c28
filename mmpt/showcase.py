"""What the quickstart shows: every direction, on held-out documents, by both decoders."""

import time
from typing import Any

from tqdm import tqdm

from mmpt.data.shards import Document
from mmpt.eval.report import Gallery
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.pipeline import Pipeline


class Showcase:
    """What the report shows: each direction on held-out documents, by both decoders."""

    def __init__(self, pipeline: Pipeline, documents: list[Document], *, seed: int) -> None:
        self.pipeline, self.documents, self.seed = pipeline, documents, seed
        self.count = 0
        self.seconds_of = {"ar": 0.0, "dida": 0.0}

    def galleries(self) -> list[Gallery]:
        """All galleries, with a progress bar."""
        makers = [
            self.text_to_image,
            self.image_to_text,
            self.text_to_speech,
            self.speech_to_text,
            self.next_frames,
            self.page_continued,
        ]
        made = [maker() for maker in tqdm(makers, desc="generate", unit="gallery")]
        return [gallery for gallery in made if gallery.rows]

    def text_to_image(self) -> Gallery:
        """Labels of held-out emoji as pictures, both decoders."""
        chosen = self._with(Image, 8)
        labels = [_first(d, Text).text for d in chosen]
        made = {
            decoder: self._batch(labels, "image", decoder=decoder, guidance=2.0)
            for decoder in ("ar", "dida")
        }
        rows: list[list[Any]] = [
            [label, ar, dida, self._codes(_first(d, Image)), _first(d, Image)]
            for d, label, ar, dida in zip(chosen, labels, made["ar"], made["dida"], strict=True)
        ]
        return Gallery(
            title="Text to image",
            text="Labels of pictures that the model never saw. One id at a time (64 passes), and "
            "all 64 codes in parallel (8 passes); then the original through the codec.",
            columns=("label", "one id at a time", "in parallel", "codec", "original"),
            rows=rows,
        )

    def image_to_text(self) -> Gallery:
        """Held-out pictures named."""
        chosen = self._with(Image, 6)
        pictures = [_first(d, Image) for d in chosen]
        written = self._batch(pictures, "text", max_ids=24, temperature=0.7)
        rows: list[list[Any]] = [
            [picture, text, _first(d, Text)]
            for d, picture, text in zip(chosen, pictures, written, strict=True)
        ]
        return Gallery(
            title="Image to text",
            text="Held-out pictures, what the model writes, and what people call them.",
            columns=("picture", "model", "label"),
            rows=rows,
        )

    def text_to_speech(self) -> Gallery:
        """Held-out texts spoken."""
        chosen = self._with(Audio, 4)
        texts = [_first(d, Text).text for d in chosen]
        made = {d: self._batch(texts, "speech", decoder=d) for d in ("ar", "dida")}
        rows: list[list[Any]] = [
            [text, ar, dida, self._codes(_first(d, Audio)), _first(d, Audio)]
            for d, text, ar, dida in zip(chosen, texts, made["ar"], made["dida"], strict=True)
        ]
        return Gallery(
            title="Text to speech",
            text="Held-out texts. 12.5 codes a second, in spans of at most 26 codes.",
            columns=("text", "one id at a time", "in parallel", "codec", "original"),
            rows=rows,
        )

    def speech_to_text(self) -> Gallery:
        """Held-out speech transcribed."""
        chosen = self._with(Audio, 4)
        sounds = [_first(d, Audio) for d in chosen]
        written = self._batch(sounds, "text", max_ids=24, temperature=0.7)
        rows: list[list[Any]] = [
            [sound, text, _first(d, Text)]
            for d, sound, text in zip(chosen, sounds, written, strict=True)
        ]
        return Gallery(
            title="Speech to text",
            text="Held-out recordings, what the model writes, and what was said.",
            columns=("speech", "model", "transcript"),
            rows=rows,
        )

    def next_frames(self) -> Gallery:
        """Held-out clips continued from their first nine frames."""
        rows: list[list[Any]] = []
        for number, document in enumerate(self._with(Video, 4)):
            clip, label = _first(document, Video), _first(document, Text)
            begin = Video(clip.frames[:9], clip.fps)
            made = [
                Video(self._one(label, "video", number, begin=begin, decoder=d).frames, clip.fps)  # type: ignore[union-attr] # a video was asked for
                for d in ("ar", "dida")
            ]
            rows.append([label, begin, *made, clip])
        return Gallery(
            title="The next frames of a video",
            text="The first nine frames of held-out clips; the model makes the next eight.",
            columns=("label", "given", "one id at a time", "in parallel", "original"),
            rows=rows,
        )

    def page_continued(self) -> Gallery:
        """A held-out page continued with text and pictures."""
        pages = [d for d in self.documents if d.order == "fixed"][:2]
        rows: list[list[Any]] = []
        for number, page in enumerate(pages):
            given = page.parts[:1]
            if isinstance(given[0], Text):
                given = [Text(given[0].text[:400])]
            done = self.pipeline(*given, seed=self.seed + number, max_ids=240, temperature=0.8)
            self.count += len(done)
            rows.append([given, done.parts])
        return Gallery(
            title="A page continued",
            text="The beginning of a held-out page of a handbook, and what the model goes on with.",
            columns=("given", "continued"),
            rows=rows,
        )

    def _with(self, kind: type, count: int) -> list[Document]:
        """The first documents in any order that hold a part of this kind and a text."""
        found = [
            d
            for d in self.documents
            if d.order == "any"
            and all(any(isinstance(p, k) for p in d.parts) for k in (kind, Text))
        ]
        step = max(1, len(found) // count)  # spread over the set
        return found[::step][:count]

    def _codes(self, part: Part) -> Part:
        processor = self.pipeline.processor
        return processor.decode_segments(processor.encode_parts([part]))[0]

    def _batch(self, prompts: list[Any], to: Any, **settings: Any) -> list[Part]:
        if not prompts:
            return []
        began = time.monotonic()
        seeds = [self.seed + i for i in range(len(prompts))]
        done = self.pipeline.batch([[p] for p in prompts], to=to, seeds=seeds, **settings)
        self._count(len(done), to, settings, began)
        return [result[0] for result in done]

    def _one(self, prompt: Part, to: Any, number: int, **settings: Any) -> Part:
        began = time.monotonic()
        [part] = self.pipeline(prompt, to=to, seed=self.seed + number, **settings)
        self._count(1, to, settings, began)
        return part

    def _count(self, count: int, to: str, settings: dict[str, Any], began: float) -> None:
        self.count += count
        if to != "text":
            self.seconds_of[settings["decoder"]] += time.monotonic() - began


def _first(document: Document, kind: type) -> Any:
    return next(part for part in document.parts if isinstance(part, kind))
