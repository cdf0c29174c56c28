"""Templates: how the parts of a document are put in order, and where they are cut.

Each is a function of the document and of what it may use, and gives the new parts in order. Parts
that a template does not speak of come first where they may help, and last where they only follow.

- speech-text-spans: runs of words are heard instead of read (arXiv 2411.17607);
- streaming: 13 text ids, then 26 codes of sound, in turn (GLM-4-Voice, arXiv 2412.02612);
- recognition, synthesis: a sound and what it says;
- captions-before, captions-after: pictures and clips, and the texts about them;
- frames-with-transcript: frames and what is said at that time, in time order (Emu3.5,
  arXiv 2510.26583);
- infilling: what stands before a gap, what stands after it, then what was in it (arXiv 2207.14255).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mmpt.config import UserError
from mmpt.data.interleave.cuts import (
    Entry,
    NoPairError,
    Original,
    beside,
    cut_clip,
    cut_sound,
    cut_text,
)
from mmpt.data.interleave.recipe import InterleaveRecipe
from mmpt.data.interleave.words import (
    CODE_SECONDS,
    Pair,
    find_pairs,
    timed_texts,
    when_heard,
    word_ends,
)
from mmpt.parts import Audio, Image, Text, Video

if TYPE_CHECKING:
    from mmpt.tokenizers.speech import SpeechCodec
    from mmpt.tokenizers.text import TextCodec

# the vocabulary has no structure ids for these
BEFORE, AFTER, BETWEEN = (
    {"type": "text", "text": mark} for mark in ("[before]", "[after]", "[between]")
)


@dataclass(frozen=True)
class Tools:
    """What templates use; a codec is opened when it is needed first."""

    recipe: InterleaveRecipe

    def check(self) -> None:
        """Open the codecs that the templates may need; raises UserError for what cannot serve."""
        for template, codec in (("streaming", "text"), ("speech-text-spans", "speech")):
            if self.recipe.templates.get(template):
                getattr(self, codec)

    @cached_property
    def text(self) -> "TextCodec":
        """The text codec."""
        from mmpt.tokenizers import load
        from mmpt.tokenizers.text import TextCodec

        codec = load(self.recipe.text)
        if not isinstance(codec, TextCodec):
            raise UserError(f"text = {self.recipe.text} is no tokenizer of text; use text-2k")
        return codec

    @cached_property
    def speech(self) -> "SpeechCodec":
        """The speech codec, whose spelling tells when words are said."""
        from mmpt.tokenizers import load
        from mmpt.tokenizers.speech import SpeechCodec

        codec = load(self.recipe.speech)
        if not isinstance(codec, SpeechCodec):
            raise UserError(f"speech = {self.recipe.speech} does not spell; use speech-12hz")
        return codec


Template = Callable[[Original, Tools, np.random.Generator], list[Entry]]


def speech_text_spans(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Text whose runs of words, of Poisson lengths, are heard until `ratio` of all words are."""
    pairs = find_pairs(original)
    if len(pairs) > 1:  # each is heard or read as a whole
        number = sum(len(original.text(pair.texts[0]).split()) for pair in pairs)
        heard = _choose(rng, len(pairs), number, tools.recipe)
        parts = [_read_or_heard(original, *each) for each in zip(pairs, heard, strict=True)]
        return original.whole(original.but(*_members(pairs))) + parts
    [pair] = pairs
    number = sum(len(original.text(text).split()) for text in pair.texts)
    words = when_heard(original, pair, tools) if number > 1 else []
    if len(words) < 2:
        raise NoPairError("fewer than two words that can be told apart in the sound")
    marked = list(zip(words, _choose(rng, len(words), number, tools.recipe), strict=True))
    ends = [  # the last word of each run
        (word, is_heard)
        for (word, is_heard), after in itertools.zip_longest(marked, marked[1:])
        if after is None or (word.of, is_heard) != (after[0].of, after[1])
    ]
    sounds = cut_sound(original, pair.sound, [word.until for word, _ in ends[:-1]])
    said: list[Entry] = []
    for index in pair.texts:
        places = [word.end for word, _ in ends if word.of == index]
        said += cut_text(original, index, places[:-1])
    parts = original.whole(original.but(*_members(pairs)))
    for (_, is_heard), piece, text in zip(ends, sounds, said, strict=True):
        parts.append(beside(piece, text) if is_heard else beside(text, piece))
    return parts


def streaming(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """`text_ids` ids of text, `sound_codes` codes of sound, in turn; what is left over comes last.

    Text is cut between ids of the text codec (and between characters), sound by its length.
    """
    pairs, size = find_pairs(original), CODE_SECONDS * tools.recipe.sound_codes
    parts = original.whole(original.but(*_members(pairs)))
    for pair in pairs:
        if len(pair.texts) > 1:
            raise NoPairError("several texts are said in one sound")
        [text] = pair.texts
        places = _id_places(tools, original.text(text))
        seconds = original.sound(pair.sound).seconds
        times = [k * size for k in range(1, math.ceil(seconds / size))]
        # the shorter one ends first, and the rest of the other is one piece
        places = places[: len(times) + 1]
        sounds = cut_sound(original, pair.sound, times[: len(places)])
        turns = itertools.zip_longest(cut_text(original, text, places), sounds)
        parts += [piece for turn in turns for piece in turn if piece is not None]
    return parts


def recognition(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Sound, then what it says; then the rest."""
    pairs = find_pairs(original)
    order = [index for pair in pairs for index in (pair.sound, *pair.texts)]
    return original.whole([*order, *original.but(*order)])


def synthesis(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """What a sound says, then the sound; then the rest."""
    pairs = find_pairs(original)
    order = [index for pair in pairs for index in (*pair.texts, pair.sound)]
    return original.whole([*order, *original.but(*order)])


def captions_before(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Texts, then the pictures and clips that they are about, then the rest."""
    texts, shown = _captioned(original)
    return original.whole([*texts, *shown, *original.but(*texts, *shown)])


def captions_after(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Pictures and clips, then the texts about them, then the rest."""
    texts, shown = _captioned(original)
    return original.whole([*shown, *texts, *original.but(*texts, *shown)])


def frames_with_transcript(
    original: Original, tools: Tools, rng: np.random.Generator
) -> list[Entry]:
    """A clip cut where what is said begins: frames, then the words, in time order.

    Of each piece the first frame is shown as a picture, or all of it (`frames` of the recipe).
    """
    clips, texts = original.of_type(Video), timed_texts(original)
    if len(clips) != 1 or not texts:
        raise NoPairError("not one clip with texts that say when they begin")
    [clip] = clips
    video = original.document.parts[clip]
    assert isinstance(video, Video)
    begin = (original.time(clip) or (0.0, 0.0))[0]
    texts.sort(key=lambda index: original.time(index) or (0.0, 0.0))
    count = len(video.frames)
    pictures = tools.recipe.frames == "pictures" and count > 1
    starts = [round(((original.time(i) or (0, 0))[0] - begin) * video.fps) for i in texts]
    # what is shown before the first words belongs to them
    edges = [0, *(min(max(start, 0), count) for start in starts[1:])]
    places = sorted({*edges, *(edge + pictures for edge in edges)} - {0} & set(range(count)))
    pieces = dict(zip([0, *places], cut_clip(original, clip, places), strict=True))
    parts: list[Entry] = []
    for text, edge in zip(original.whole(texts), edges, strict=True):
        piece = pieces.pop(edge, None)  # none is left for words that begin in the same frame
        if piece and pictures:
            piece = piece | {"type": "image"}
            rest = pieces.pop(edge + 1, None) if edge + 1 not in edges else None
            text = beside(text, rest) if rest else text
        parts += [piece, text] if piece else [text]
    return parts + original.whole(original.but(clip, *texts))


def infilling(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Prefix, suffix, middle: the gap is in one text (between words), sound or clip.

    Which one and where is drawn; the three begin with the texts [before], [after] and [between].
    """
    choices = [(index, places) for index in original.but() if (places := _places(original, index))]
    if not choices:
        raise NoPairError("no text of three words, sound of three codes or clip of three frames")
    index, places = choices[rng.integers(len(choices))]
    chosen = sorted(rng.choice(len(places), 2, replace=False).tolist())
    cut = {Text: cut_text, Audio: cut_sound, Video: cut_clip}[type(original.document.parts[index])]
    prefix, middle, suffix = cut(original, index, [places[k] for k in chosen])
    earlier = original.whole(range(index))
    later = original.whole(range(index + 1, len(original.record.parts)))
    return [BEFORE, *earlier, prefix, AFTER, suffix, *later, BETWEEN, middle]


TEMPLATES: Mapping[str, Template] = {
    "speech-text-spans": speech_text_spans,
    "streaming": streaming,
    "recognition": recognition,
    "synthesis": synthesis,
    "captions-before": captions_before,
    "captions-after": captions_after,
    "frames-with-transcript": frames_with_transcript,
    "infilling": infilling,
}


def _captioned(original: Original) -> tuple[list[int], list[int]]:
    texts, shown = original.of_type(Text), original.of_type(Image, Video)
    if not texts or not shown or original.document.order == "fixed":
        raise NoPairError("no pictures or clips with texts about them")  # a page has its order
    return texts, shown


def _members(pairs: Sequence[Pair]) -> list[int]:
    return [index for pair in pairs for index in (pair.sound, *pair.texts)]


def _read_or_heard(original: Original, pair: Pair, is_heard: bool) -> Entry:
    [sound], texts = original.whole([pair.sound]), original.whole(pair.texts)
    return beside(sound, texts[0]) if is_heard else beside(texts[0], sound)


def _choose(
    rng: np.random.Generator, count: int, num_words: int, recipe: InterleaveRecipe
) -> list[bool]:
    """Which of `count` words (or captions of `num_words` in all) are heard.

    Runs of Poisson lengths that do not overlap, until the share is reached.
    """
    wanted, mean = max(1, round(recipe.ratio * count)), recipe.mean_words * count / num_words
    chosen = np.zeros(count, dtype=bool)
    while left := wanted - int(chosen.sum()):
        length = int(np.clip(rng.poisson(mean), 1, left))
        # shorter, where so many are nowhere free in a row
        while not len(free := np.flatnonzero(np.convolve(chosen, np.ones(length), "valid") == 0)):
            length -= 1
        start = int(rng.choice(free))
        chosen[start : start + length] = True
    return chosen.tolist()


def _id_places(tools: Tools, text: str) -> list[int]:
    """Characters that every `text_ids`-th id of a text begins with; no piece is white space."""
    offsets = tools.text.tokenizer.encode(text, add_special_tokens=False).offsets
    places = []
    for begin, _ in offsets[tools.recipe.text_ids :: tools.recipe.text_ids]:
        if text[places[-1] if places else 0 : begin].strip() and text[begin:].strip():
            places.append(begin)
    return places


def _places(original: Original, index: int) -> Sequence[float]:
    """Where a part may be cut to fill a gap; none where there are fewer than two."""
    part = original.document.parts[index]
    found: Sequence[float] = ()
    if isinstance(part, Text):
        found = word_ends(part.text)[:-1]
    elif isinstance(part, Audio):
        found = [k * CODE_SECONDS for k in range(1, math.ceil(part.seconds / CODE_SECONDS))]
    elif isinstance(part, Video):
        found = range(1, len(part.frames))
    return found if len(found) > 1 else ()
