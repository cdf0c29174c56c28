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
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmpt.config import UserError
from mmpt.data.align import align
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
from mmpt.parts import Audio, Image, Text, Video

CODE_SECONDS = 0.08  # of one position of the speech codec
# the vocabulary has no structure ids for these
BEFORE, AFTER, BETWEEN = (
    {"type": "text", "text": mark} for mark in ("[before]", "[after]", "[between]")
)


@dataclass(frozen=True)
class Tools:
    """What templates use; a codec is opened when one needs it."""

    recipe: InterleaveRecipe

    @cached_property
    def text(self):
        """The text codec."""
        from mmpt.tokenizers import load
        from mmpt.tokenizers.text import TextCodec

        return _expect(load(self.recipe.text), TextCodec, self.recipe.text)

    @cached_property
    def speech(self):
        """The speech codec, whose spelling tells when words are said."""
        from mmpt.tokenizers import load
        from mmpt.tokenizers.speech import SpeechCodec

        return _expect(load(self.recipe.speech), SpeechCodec, self.recipe.speech)


Template = Callable[[Original, Tools, np.random.Generator], list[Entry]]


@dataclass(frozen=True)
class Words:
    """Words (or captions) of text part `of`: its characters up to `end`, heard until `until` s."""

    of: int
    end: int
    until: float


def speech_text_spans(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Text whose runs of words, of Poisson lengths, are heard until `ratio` of all words are."""
    sound, texts = _spoken(original)
    words = _when(original, sound, texts, tools)
    if len(words) < 2:
        raise NoPairError("fewer than two words that can be told apart in the sound")
    wanted = round(tools.recipe.ratio * len(words))
    heard = _choose(rng, len(words), max(1, wanted), tools.recipe.mean_words)
    said_how = list(zip(words, heard, strict=True))
    ends = [  # the last word of each run
        (word, is_heard)
        for (word, is_heard), after in itertools.zip_longest(said_how, said_how[1:])
        if after is None or (word.of, is_heard) != (after[0].of, after[1])
    ]
    sounds = cut_sound(original, sound, [word.until for word, _ in ends[:-1]])
    said: list[Entry] = []
    for index in texts:
        places = [word.end for word, _ in ends if word.of == index]
        said += cut_text(original, index, places[:-1])
    parts = original.whole(original.but(sound, *texts))
    for (_, is_heard), piece, text in zip(ends, sounds, said, strict=True):
        parts.append(beside(piece, text) if is_heard else beside(text, piece))
    return parts


def streaming(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """`text_ids` ids of text, `sound_codes` codes of sound, in turn; what is left over comes last.

    Text is cut between ids of the text codec (and between characters), sound by its length.
    """
    sound, texts = _spoken(original)
    if len(texts) > 1:
        raise NoPairError("several texts are said in one sound")
    [text] = texts
    size = CODE_SECONDS * tools.recipe.sound_codes
    places = _id_places(tools, original.text(text))
    seconds = [k * size for k in range(1, math.ceil(original.sound(sound).seconds / size))]
    # the shorter one ends first, and the rest of the other is one piece
    places = places[: len(seconds) + 1]
    seconds = seconds[: len(places)]
    pieces = itertools.zip_longest(
        cut_text(original, text, places), cut_sound(original, sound, seconds)
    )
    first = original.whole(original.but(sound, text))
    return first + [piece for pair in pieces for piece in pair if piece is not None]


def recognition(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """Sound, then what it says, then the rest."""
    sound, texts = _spoken(original)
    return original.whole([sound, *texts, *original.but(sound, *texts)])


def synthesis(original: Original, tools: Tools, rng: np.random.Generator) -> list[Entry]:
    """What a sound says, then the sound, then the rest."""
    sound, texts = _spoken(original)
    return original.whole([*texts, sound, *original.but(sound, *texts)])


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
    clips, texts = original.of_type(Video), _timed(original)
    if len(clips) != 1 or not texts:
        raise NoPairError("not one clip with texts that say when they begin")
    [clip] = clips
    video = original.document.parts[clip]
    assert isinstance(video, Video)
    begin = (original.time(clip) or (0.0, 0.0))[0]
    texts.sort(key=lambda index: original.time(index) or (0.0, 0.0))
    count, pictures = len(video.frames), tools.recipe.frames == "pictures"
    starts = [round(((original.time(i) or (0, 0))[0] - begin) * video.fps) for i in texts]
    # what is shown before the first words belongs to them
    edges = [0, *(min(max(start, 0), count) for start in starts[1:])]
    places = sorted({*edges, *(edge + pictures for edge in edges)} - {0} & set(range(count)))
    pieces = dict(zip([0, *places], cut_clip(original, clip, places), strict=True))
    parts: list[Entry] = []
    for text, edge in zip(original.whole(texts), edges, strict=True):
        piece = pieces.pop(edge, None)  # none is left for words that begin in the same frame
        if piece and pictures:
            piece = {k: v for k, v in piece.items() if k != "fps"} | {"type": "image"}
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


def _spoken(original: Original) -> tuple[int, list[int]]:
    """The number of the sound, and those of the texts that it says, in order.

    Texts that say when they begin are what is said; else the only text is, or the first of views
    of one idea.
    """
    sounds, texts, timed = original.of_type(Audio), original.of_type(Text), _timed(original)
    if len(sounds) != 1:
        raise NoPairError("not exactly one sound")
    if not timed and len(texts) > 1 and original.document.order == "any":
        texts = texts[:1]
    if not timed and len(texts) != 1:
        raise NoPairError("no text, or several, that a sound may say")
    return sounds[0], timed or texts


def _captioned(original: Original) -> tuple[list[int], list[int]]:
    texts, shown = original.of_type(Text), original.of_type(Image, Video)
    if not texts or not shown or original.document.order == "fixed":
        raise NoPairError("no pictures or clips with texts about them")  # a page has its order
    return texts, shown


def _timed(original: Original) -> list[int]:
    return [index for index in original.of_type(Text) if original.time(index)]


def _when(original: Original, sound: int, texts: Sequence[int], tools: Tools) -> list[Words]:
    """Words in order, each heard until the next begins; the last ones until the sound ends."""
    heard = original.sound(sound)
    begin = (original.time(sound) or (0.0, 0.0))[0]
    if original.time(texts[0]):
        ends = [(index, len(original.text(index))) for index in texts]
        times = [original.time(index) or (0.0, 0.0) for index in texts]
    else:
        said = original.text(texts[0])
        ends = [(texts[0], end) for end in _word_ends(said)]
        times = original.record.parts[texts[0]].get("words")
        if times is None:
            found = align(tools.speech, heard, said, min_score=tools.recipe.min_score).words
            times = [(start + begin, end + begin) for start, end in found]
        _check_times(times, len(ends))
    middles = [(end + start) / 2 - begin for (_, end), (start, _) in itertools.pairwise(times)]
    until = [min(max(middle, 0.0), heard.seconds) for middle in middles] + [heard.seconds]
    words = [Words(of, end, time) for (of, end), time in zip(ends, until, strict=True)]
    return _join_short(words)


def _word_ends(text: str) -> list[int]:
    """Where each word ends; white space belongs to the word behind it, as in ids of text."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return [*ends[:-1], len(text)]


def _check_times(times: object, count: int) -> None:
    pairs = times if isinstance(times, list | tuple) else []
    numbers = [time for pair in pairs if isinstance(pair, list | tuple) for time in pair]
    good = all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not good or len(pairs) != count or len(numbers) != 2 * count:
        raise UserError(f"bad json: words must be a [start, end] in seconds for each of {count}")


def _join_short(words: Sequence[Words]) -> list[Words]:
    """Words that are heard for less than a code are not told apart from those before them."""
    joined: list[Words] = []
    for word in words:
        since = [0.0, *(other.until for other in joined), word.until][-3:]
        short = min(b - a for a, b in itertools.pairwise(since)) < CODE_SECONDS
        if joined and short and joined[-1].of == word.of:
            joined.pop()
        joined.append(word)
    lengths = np.diff([0.0, *(word.until for word in joined)])
    if lengths.min() <= 0:
        raise UserError("bad times: a text has no sound; its start or end is wrong")
    return joined


def _choose(rng: np.random.Generator, count: int, wanted: int, mean: float) -> list[bool]:
    """`wanted` of `count` in runs of Poisson lengths that do not overlap."""
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
        found = _word_ends(part.text)[:-1]
    elif isinstance(part, Audio):
        found = [k * CODE_SECONDS for k in range(1, math.ceil(part.seconds / CODE_SECONDS))]
    elif isinstance(part, Video):
        found = range(1, len(part.frames))
    return found if len(found) > 1 else ()


def _expect(codec, kind: type, name: str):
    if not isinstance(codec, kind):
        raise UserError(f"{name} is a {codec.kind} tokenizer; name a {kind.kind} one")
    return codec
