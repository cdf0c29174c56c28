"""Documents that are cut into pieces and put together again.

A template makes new parts out of the old ones. Each says what it is a piece `of`: the number of a
part and of the piece. Where only one of two media is shown, the other lies beside it, unread by
models: a text part may carry the sound that says it, a sound its words; `twin` says what these are
a piece of. So nothing is lost, and `restore` gives the parts back: what was not cut byte for byte,
the frames of a cut clip without loss, a cut sound as 16-bit samples.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.data.shards import (
    PLAIN_MEDIA,
    Document,
    Record,
    Sample,
    encode_document,
    load_document,
)
from mmpt.parts import Audio, Image, Text, Video
from mmpt.sound import sound_bytes

NOTES = "interleaved"  # the key of a document's json that says how to restore it
DESCRIBED = ("base", "order", "parts", "source", "license", "mirror")
CONTENT = ("text", "data", "suffix")
OWN = (*CONTENT, "words", "start", "end")  # of a part, not of its pieces

Entry = dict[str, Any]


class NoPairError(UserError):
    """The document has not what a template puts together; nothing is wrong with it."""


@dataclass(frozen=True)
class Original:
    """A document as it came: decoded, and as `Record`, whose parts keep their bytes and keys."""

    document: Document
    record: Record

    @classmethod
    def load(cls, sample: Sample) -> "Original":
        """Raises UserError for a sample that is no document."""
        document = load_document(sample)
        described = json.loads(sample.members.get("json", b"{}"))
        if not isinstance(described, dict) or "parts" not in described:
            described = {"order": "any", "parts": _paired(document, sample)}
        record = Record(
            document.key,
            document.base,
            document.order,
            tuple(_with_bytes(entry, sample) for entry in described["parts"]),
            document.source,
            str(described.get("license", "")),
            document.mirror,
            {key: value for key, value in described.items() if key not in DESCRIBED},
        )
        return cls(document, record)

    def of_type(self, *kinds: type) -> list[int]:
        """The numbers of the parts of some types."""
        return [i for i, part in enumerate(self.document.parts) if isinstance(part, kinds)]

    def text(self, index: int) -> str:
        """What a text part says."""
        part = self.document.parts[index]
        assert isinstance(part, Text)
        return part.text

    def sound(self, index: int) -> Audio:
        """A sound part."""
        part = self.document.parts[index]
        assert isinstance(part, Audio)
        return part

    def time(self, index: int) -> tuple[float, float] | None:
        """When a part begins and ends, in seconds, where the shard says it."""
        return self.document.times[index] if self.document.times else None

    def whole(self, indices: Iterable[int]) -> list[Entry]:
        """Parts as they are."""
        return [self.record.parts[index] | {"of": [index, 0]} for index in indices]

    def but(self, *indices: int) -> list[int]:
        """The numbers of all other parts."""
        return [i for i in range(len(self.record.parts)) if i not in indices]

    def piece(self, index: int, number: int, content: Entry) -> Entry:
        """One piece of a part, with the keys that hold for all of it (voice, fps)."""
        own = {k: v for k, v in self.record.parts[index].items() if k not in OWN}
        return own | {"of": [index, number]} | content

    def become(self, template: str, parts: Sequence[Entry]) -> Record:
        """The record of the new parts, with what `restore` needs."""
        # an empty text keeps the place of the key, so that restored shards have equal bytes
        kept = [
            {k: "" if k == "text" else v for k, v in entry.items() if k not in ("data", "suffix")}
            for entry in self.record.parts
        ]
        notes = {"template": template, "order": self.record.order, "parts": kept}
        more = {**self.record.more, NOTES: notes}
        return replace(self.record, order="fixed", parts=tuple(parts), more=more)


def cut_text(original: Original, index: int, places: Sequence[int]) -> list[Entry]:
    """Pieces of a text, cut before the characters at `places`."""
    if not places:
        return original.whole([index])
    text = original.text(index)
    return [
        original.piece(index, number, {"text": text[begin:end]})
        for number, (begin, end) in enumerate(itertools.pairwise([0, *places, len(text)]))
    ]


def cut_sound(original: Original, index: int, places: Sequence[float]) -> list[Entry]:
    """Pieces of a sound as FLAC, cut at seconds; they say when they begin and end."""
    if not places:
        return original.whole([index])
    sound = original.sound(index)
    rate, begin = sound.sample_rate, (original.time(index) or (0.0, 0.0))[0]
    cuts = [0, *(round(place * rate) for place in places), len(sound.wave)]
    pieces = []
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        content = {
            "data": sound_bytes(sound.wave[first:last], rate, ".flac"),
            "suffix": "flac",
            "start": round(begin + first / rate, 4),
            "end": round(begin + last / rate, 4),
        }
        pieces.append(original.piece(index, number, content))
    return pieces


def cut_clip(original: Original, index: int, places: Sequence[int]) -> list[Entry]:
    """Pieces of a clip without loss, cut before the frames at `places`."""
    if not places:
        return original.whole([index])
    clip = original.document.parts[index]
    assert isinstance(clip, Video)
    begin = (original.time(index) or (0.0, 0.0))[0]
    pieces = []
    for number, (first, last) in enumerate(itertools.pairwise([0, *places, len(clip.frames)])):
        content = _encoded(clip.frames[first:last], clip.fps) | {
            "fps": clip.fps,
            "start": round(begin + first / clip.fps, 4),
            "end": round(begin + last / clip.fps, 4),
        }
        pieces.append(original.piece(index, number, content))
    return pieces


def beside(shown: Entry, hidden: Entry) -> Entry:
    """A part that is shown and carries another, which is not."""
    about = {key: hidden[key] for key in ("fps", "start", "end") if key in hidden}
    content = {key: hidden[key] for key in CONTENT if key in hidden}
    return about | shown | content | {"twin": hidden["of"]}


def restore(record: Record) -> Record:
    """The document as it was before `Original.become`. Raises UserError when it cannot be."""
    try:
        notes = record.more[NOTES]
        parts = tuple(
            _joined(record.parts, index, kept) for index, kept in enumerate(notes["parts"])
        )
        more = {key: value for key, value in record.more.items() if key != NOTES}
        return replace(record, order=notes["order"], parts=parts, more=more)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"no interleaved document: {error!r}; only these can be restored") from None


def _joined(entries: Sequence[Entry], index: int, kept: Entry) -> Entry:
    """One part again, of all the pieces of it that are shown or lie beside others."""
    numbered = {}
    for entry in entries:
        shown = (entry["type"] == "text") == (kept["type"] == "text")
        of, number = entry.get("of" if shown else "twin", (None, 0))
        if of == index:
            numbered[number] = entry
    pieces = [numbered[number] for number in range(max(len(numbered), 1))]
    if kept["type"] == "text":
        return kept | {"text": "".join(piece["text"] for piece in pieces)}
    if len(pieces) == 1:
        return kept | {"data": pieces[0]["data"], "suffix": pieces[0]["suffix"]}
    if kept["type"] == "audio":
        sounds = [Audio.load(piece["data"]) for piece in pieces]
        wave = np.concatenate([sound.wave for sound in sounds])
        data = sound_bytes(wave, sounds[0].sample_rate, ".flac")
        return kept | {"data": data, "suffix": "flac"}
    fps = pieces[0]["fps"]
    clips = [Video.load(piece["data"], fps=fps) for piece in pieces]
    return kept | {"fps": fps} | _encoded(np.concatenate([clip.frames for clip in clips]), fps)


def _paired(document: Document, sample: Sample) -> list[Entry]:
    texts = [{"type": "text", "text": p.text} for p in document.parts if isinstance(p, Text)]
    names = [name for name in sample.members if name in PLAIN_MEDIA]
    return [*texts, *({"type": PLAIN_MEDIA[name], "ref": name} for name in names)]


def _with_bytes(entry: Entry, sample: Sample) -> Entry:
    ref = entry.get("ref")
    if ref not in sample.members:
        return entry
    kept = {key: value for key, value in entry.items() if key != "ref"}
    return kept | {"data": sample.members[ref], "suffix": ref.rpartition(".")[2]}


def _encoded(frames: np.ndarray, fps: float) -> Entry:
    """The content of a clip, or of a still, that holds these frames as they are."""
    part = Video(frames, fps) if len(frames) > 1 else Image(frames[0])
    [entry] = encode_document(Document("", "", "fixed", [part])).parts
    return {key: value for key, value in entry.items() if key in CONTENT}
