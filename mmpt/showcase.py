"""What the quickstart shows: every direction, on held-out documents, by both decoders."""

import time
from typing import Any

from mmpt.data.shards import Document
from mmpt.eval.report import Gallery
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.pipeline import Pipeline
from mmpt.progress import Bar
from mmpt.results import Medium


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
        made = [maker() for maker in Bar(makers, desc="generate", unit="gallery")]
        return [gallery for gallery in made if gallery.rows]

    def text_to_image(self) -> Gallery:
        """Labels of held-out emoji as pictures."""
        return self._from_text(
            Image,
            "image",
            count=8,
            title="Text to image",
            text="Labels of pictures that the model never saw. One id at a time (64 passes), and "
            "all 64 codes in parallel (8 passes); then the original through the codec.",
            guidance=2.0,
        )

    def text_to_speech(self) -> Gallery:
        """Held-out texts spoken."""
        return self._from_text(
            Audio,
            "speech",
            count=4,
            title="Text to speech",
            text="Held-out texts. 12.5 codes a second, in spans of at most 26 codes.",
        )

    def image_to_text(self) -> Gallery:
        """Held-out pictures named."""
        return self._to_text(
            Image,
            count=6,
            title="Image to text",
            text="Held-out pictures, what the model writes, and what people call them.",
            columns=("picture", "model", "label"),
        )

    def speech_to_text(self) -> Gallery:
        """Held-out speech transcribed."""
        return self._to_text(
            Audio,
            count=4,
            title="Speech to text",
            text="Held-out recordings, what the model writes, and what was said.",
            columns=("speech", "model", "transcript"),
        )

    def _from_text(
        self, kind: type, to: Medium, *, count: int, title: str, text: str, **settings: Any
    ) -> Gallery:
        """The texts of held-out documents as media, by both decoders, beside codec and original."""
        chosen = self._with(kind, count)
        texts = [_first(d, Text).text for d in chosen]
        ar, dida = (self._batch(texts, to, decoder=d, **settings) for d in ("ar", "dida"))
        originals = [_first(d, kind) for d in chosen]
        decoded = [self._codes(original) for original in originals]
        columns = ("text", "one id at a time", "in parallel", "codec", "original")
        rows = [list(row) for row in zip(texts, ar, dida, decoded, originals, strict=True)]
        return Gallery(title=title, text=text, columns=columns, rows=rows)

    def _to_text(
        self, kind: type, *, count: int, title: str, text: str, columns: tuple[str, ...]
    ) -> Gallery:
        """Held-out media in words, beside what people wrote."""
        chosen = self._with(kind, count)
        media = [_first(d, kind) for d in chosen]
        written = self._batch(media, "text", max_ids=24, temperature=0.7)
        labels = [_first(d, Text) for d in chosen]
        rows = [list(row) for row in zip(media, written, labels, strict=True)]
        return Gallery(title=title, text=text, columns=columns, rows=rows)

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

    def _batch(self, prompts: list[Any], to: Medium, **settings: Any) -> list[Part]:
        if not prompts:
            return []
        began = time.monotonic()
        seeds = [self.seed + i for i in range(len(prompts))]
        done = self.pipeline.batch([[p] for p in prompts], to=to, seeds=seeds, **settings)
        self._count(len(done), to, settings, began)
        return [result[0] for result in done]

    def _one(self, prompt: Part, to: Medium, number: int, **settings: Any) -> Part:
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
