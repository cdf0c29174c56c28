"""Conversations made of the documents of other data sets: someone asks, the model answers.

Asked for are captions, drawings, edits, spoken words, transcripts and moves in a grid world; each
in several wordings, some in two turns. Nothing is drawn or spoken anew: answers are pictures and
sounds of the sources, or plain operations on their pixels.
"""

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image

from mmpt.config import UserError
from mmpt.data import importers
from mmpt.data.edits import edit_pixels, on_colour
from mmpt.data.indexed import samples_of
from mmpt.data.interleave.cuts import Original
from mmpt.data.shards import Record, Sample
from mmpt.parts import Audio, Image, Text
from mmpt.progress import Bar

LICENSE = "of each document's source: MIT, CC-BY-SA-3.0 or Apache-2.0"
SOURCES = ("emoji", "prompts", "voices", "gridworld")
ATTRIBUTION = [
    {
        "package": f"the data set {name}",
        "gives": "pictures, words and sounds; see its card",
        "license": "as each document says",
        "copyright": "",
        "homepage": "",
        "changes": "asked for in words made here; edits of pictures, see README.md",
    }
    for name in SOURCES
]

WORDINGS = tomllib.loads(Path(__file__).with_name("wordings.toml").read_text())
COLOURS: dict[str, list[int]] = WORDINGS["colours"]
TONES: dict[str, str] = WORDINGS["tones"]  # by code point

LEAST_CHANGE = 5  # of 255, on average: less is a thing that looks the same after it

Entry = dict[str, Any]
Turns = list[tuple[str, list[Entry]]]  # who says what
Edited = tuple[str, Entry]  # what is asked for, and the picture


@dataclass(frozen=True)
class Settings:
    """The folders that hold the prepared sources, and how many conversations are made of them."""

    emoji: str = "build/emoji"
    prompts: str = "build/prompts"
    voices: str = "build/voices"
    gridworld: str = "build/gridworld"
    num_conversations: int = 8000
    max_seconds: float = 8.0  # of a sound
    per_idea: int = 3  # conversations of one kind about one base key
    image_quality: int = 92  # of edited pictures
    seed: int = 0


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write instructions-train-*.tar and instructions-heldout-*.tar; nothing is fetched."""
    settings = settings or Settings()
    sources = {name: read(getattr(settings, name), name, settings) for name in SOURCES}
    maker = Maker(sources, settings)
    records = []
    for kind, (share, names, make) in Bar(maker.kinds.items(), desc="instructions", unit="kind"):
        for name in names:
            most = round(share / len(names) * settings.num_conversations)
            records += islice(maker.records(kind, make, sources[name]), most)
    return importers.write_split(records, out, "instructions")


def read(folder: str, name: str, settings: Settings) -> list[Original]:
    """The usable documents of a prepared source; of each split as many as may be needed."""
    paths = sorted(Path(folder).glob(f"{name}-*.tar"))
    if not paths:
        raise UserError(
            f"{folder} has no {name}-*.tar; mmpt data prepare {name} --out {folder}, or say "
            f"{name}=FOLDER"
        )
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.name.rpartition("-")[0], []).append(path)
    found: list[Original] = []
    for group, shards in groups.items():
        most = settings.num_conversations // (1 if group.endswith("-train") else 9) + 1
        found += islice((each for path in shards for each in _originals(path)), most)
    return [original for original in found if _is_short(original, settings.max_seconds)]


class Maker:
    """Makes conversations out of documents; all chance follows from the seed and their keys."""

    def __init__(self, sources: Mapping[str, Sequence[Original]], settings: Settings) -> None:
        self.settings = settings
        pictures = [each for each in sources["emoji"] if each.of_type(Image)]
        self.pictures = {each.document.key: each for each in pictures}
        # share of all conversations, the sources that they are made of in equal parts, and how
        self.kinds: dict[str, tuple[float, tuple[str, ...], Callable]] = {
            "caption": (0.12, ("emoji",), self.caption),
            "draw": (0.15, ("emoji",), self.draw),
            "draw-spoken": (0.06, ("emoji",), self.draw_spoken),
            "say-what": (0.06, ("emoji",), self.say_what),
            "say": (0.07, ("emoji", "prompts"), self.say),
            "transcribe": (0.12, ("emoji", "prompts", "voices"), self.transcribe),
            "edit": (0.12, ("emoji",), self.edit),
            "variant": (0.06, ("emoji",), self.variant),
            "move": (0.08, ("gridworld",), self.move),
            "mission": (0.04, ("gridworld",), self.mission),
            "draw-edit": (0.06, ("emoji",), self.draw_edit),
            "name-say": (0.03, ("emoji",), self.name_say),
            "move-twice": (0.03, ("gridworld",), self.move_twice),
        }

    def records(
        self,
        kind: str,
        make: Callable[[Original, Random], Turns | None],
        source: Sequence[Original],
    ) -> Iterator[Record]:
        """Conversations of a kind about documents in a seeded order, a few about each idea."""
        seen: Counter[str] = Counter()
        for original in sorted(source, key=lambda o: self._hash(kind, o.document.key)):
            document = original.document
            if seen[document.base] == self.settings.per_idea:
                continue
            turns = make(original, Random(self._hash(kind, document.key)))
            if turns is None:
                continue
            seen[document.base] += 1
            yield Record(
                f"{kind}-{document.key}",
                document.base,
                "fixed",
                tuple(entry | {"role": role} for role, entries in turns for entry in entries),
                f"instructions from {document.source}",
                original.record.license,
                mirror=False,
                more={"kind": kind},
            )

    def caption(self, original: Original, rng: Random) -> Turns | None:
        """A picture and a question; its label."""
        picture = _first(original, Image)
        if picture is None:
            return None
        asked = [picture, _text(rng.choice(WORDINGS["caption"]))]
        return [("user", asked[:: rng.choice((1, -1))]), ("assistant", [_text(_label(original))])]

    def draw(self, original: Original, rng: Random) -> Turns | None:
        """A label; its picture."""
        picture = _first(original, Image)
        if picture is None:
            return None
        asked = rng.choice(WORDINGS["draw"]).format(with_article(_label(original)))
        return [("user", [_text(asked)]), ("assistant", [picture])]

    def draw_spoken(self, original: Original, rng: Random) -> Turns | None:
        """A spoken label; its picture."""
        picture, sound = _first(original, Image), _first(original, Audio)
        if picture is None or sound is None:
            return None
        asked = rng.choice(WORDINGS["draw-spoken"])
        return [("user", [*([_text(asked)] if asked else []), sound]), ("assistant", [picture])]

    def say_what(self, original: Original, rng: Random) -> Turns | None:
        """A picture; its spoken label."""
        picture, sound = _first(original, Image), _first(original, Audio)
        if picture is None or sound is None:
            return None
        return [
            ("user", [picture, _text(rng.choice(WORDINGS["say-what"]))]),
            ("assistant", [sound]),
        ]

    def say(self, original: Original, rng: Random) -> Turns | None:
        """Words; their sound."""
        sound = _first(original, Audio)
        if sound is None:
            return None
        asked = rng.choice(WORDINGS["say"]).format(_label(original))
        return [("user", [_text(asked)]), ("assistant", [sound])]

    def transcribe(self, original: Original, rng: Random) -> Turns | None:
        """A sound; its words."""
        sound = _first(original, Audio)
        if sound is None:
            return None
        asked = [sound, _text(rng.choice(WORDINGS["transcribe"]))]
        return [("user", asked[:: rng.choice((1, -1))]), ("assistant", [_text(_label(original))])]

    def edit(self, original: Original, rng: Random) -> Turns | None:
        """A picture and what to do with it; the picture after that."""
        picture, edited = _first(original, Image), self._edited(original, rng)
        if picture is None or edited is None:
            return None
        return [("user", [picture, _text(edited[0])]), ("assistant", [edited[1]])]

    def variant(self, original: Original, rng: Random) -> Turns | None:
        """A picture of a person and a skin tone or gender; the picture that shows it."""
        picture, edited = _first(original, Image), self._variant(original, rng)
        if picture is None or edited is None:
            return None
        return [("user", [picture, _text(edited[0])]), ("assistant", [edited[1]])]

    def draw_edit(self, original: Original, rng: Random) -> Turns | None:
        """A drawing, and then something to do with it."""
        drawn = self.draw(original, rng)
        edited = self._variant(original, rng) if rng.random() < 0.3 else None
        edited = edited or self._edited(original, rng)
        if drawn is None or edited is None:
            return None
        return [*drawn, ("user", [_text(edited[0])]), ("assistant", [edited[1]])]

    def name_say(self, original: Original, rng: Random) -> Turns | None:
        """A picture; its label; and then how that sounds."""
        named, sound = self.caption(original, rng), _first(original, Audio)
        if named is None or sound is None:
            return None
        return [*named, ("user", [_text(rng.choice(WORDINGS["say-it"]))]), ("assistant", [sound])]

    def move(self, original: Original, rng: Random) -> Turns | None:
        """A room and an action; the room after it."""
        return self._moves(original, rng, 1)

    def move_twice(self, original: Original, rng: Random) -> Turns | None:
        """The same with a second action."""
        return self._moves(original, rng, 2)

    def mission(self, original: Original, rng: Random) -> Turns | None:
        """A mission and a room; the first action."""
        mission, picture, action = original.record.parts[:3]
        asked = rng.choice(WORDINGS["mission"]).format(mission["text"])
        return [("user", [_text(asked), picture]), ("assistant", [action])]

    def _moves(self, original: Original, rng: Random, count: int) -> Turns | None:
        parts = original.record.parts
        places = [
            place
            for place in range(1, len(parts) - 2 * count, 2)
            if all(parts[place + 1 + 2 * n].get("text") in WORDINGS["moves"] for n in range(count))
        ]
        if not places:
            return None
        place = rng.choice(places)
        turns: Turns = []
        for n in range(count):
            asked = _text(rng.choice(WORDINGS["moves"][parts[place + 1 + 2 * n]["text"]]))
            turns.append(("user", [asked] if n else [parts[place], asked]))
            turns.append(("assistant", [parts[place + 2 + 2 * n]]))
        return turns

    def _edited(self, original: Original, rng: Random) -> Edited | None:
        numbers = original.of_type(Image)
        part = original.document.parts[numbers[0]] if numbers else None
        if not isinstance(part, Image):
            return None
        wordings = WORDINGS["edits"]
        name, colour = rng.choice((*wordings, "background")), rng.choice(list(COLOURS))
        if name == "background":
            made = on_colour(part.pixels, COLOURS[colour])
        else:
            made = edit_pixels(name, part.pixels)
        if made is None or (name == "mirror" and not original.document.mirror):
            return None
        if np.abs(made.astype(int) - part.pixels).mean() < LEAST_CHANGE:
            return None
        data = importers.encode_webp(PIL.Image.fromarray(made), quality=self.settings.image_quality)
        picture = {"type": "image", "suffix": "webp", "data": data, "edit": name}
        return rng.choice(wordings[name]).format(colour), picture

    def _variant(self, original: Original, rng: Random) -> Edited | None:
        document = original.document
        found = [
            (wish, name, self.pictures[key])
            for wish, name, key in variants(document.key)
            if key in self.pictures and key != document.key
        ]
        same = [each for each in found if each[2].document.base == document.base]
        if not same:
            return None
        wish, name, other = rng.choice(same)
        picture = _first(other, Image)
        assert picture is not None
        return rng.choice(WORDINGS[wish]).format(name), picture

    def _hash(self, kind: str, key: str) -> bytes:
        return hashlib.sha256(f"{self.settings.seed} {kind} {key}".encode()).digest()


def with_article(label: str) -> str:
    """A label as it stands in a sentence: "a red apple", "scissors", "flag: Chad"."""
    several = label.endswith("s") and not label.endswith("ss")
    if ":" in label or not label[0].islower() or several:
        return label
    return ("an " if label[0] in "aeiou" else "a ") + label


def variants(key: str) -> Iterator[tuple[str, str, str]]:
    """Skin tones and genders of an emoji by its code points, whether there is a picture or not.

    The kind of the wish, what is wished, and the code points of what shows it.
    """
    if len(re.findall("-1f3f[b-f]", key)) < 2:  # of one person
        first, dash, rest = re.sub("-1f3f[b-f]", "", key).partition("-")
        for tone, name in TONES.items():
            yield "tone", name, f"{first}-{tone}{dash}{rest}"
    if len(re.findall("1f46[89]|1f9d1", key)) > 1:
        return
    for sign, person, name in (("2640", "1f469", "woman"), ("2642", "1f468", "man")):
        if re.match("1f46[89]|1f9d1", key):
            yield "gender", name, re.sub("^(1f46[89]|1f9d1)", person, key)
        yield "gender", name, re.sub("-200d-264[02]$", "", key) + f"-200d-{sign}"


def _originals(path: Path) -> Iterator[Original]:
    for item in samples_of(path):
        if not isinstance(item, Sample):
            raise UserError(f"{path} is damaged ({item.why}); prepare it again")
        yield Original.load(item)


def _is_short(original: Original, most: float) -> bool:
    return all(part.seconds <= most for part in original.document.parts if isinstance(part, Audio))


def _first(original: Original, kind: type) -> Entry | None:
    """The first part of a type, with its bytes as they are."""
    numbers = original.of_type(kind)
    return original.record.parts[numbers[0]] if numbers else None


def _label(original: Original) -> str:
    return original.text(original.of_type(Text)[0])


def _text(text: str) -> Entry:
    return {"type": "text", "text": text}
