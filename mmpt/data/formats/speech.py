"""Sound files with what is said in them: a transcript beside the file, or subtitles with times."""

from collections.abc import Iterator
from pathlib import Path

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, wave_part
from mmpt.data.formats.files import base_of, each, read_inside, root_of, walk
from mmpt.data.formats.subtitles import Cue, parse
from mmpt.media import read_text
from mmpt.parts import Audio

SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")
SUBTITLES = (".srt", ".vtt")


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Sounds of a folder, each with NAME.srt, NAME.vtt or NAME.txt beside it.

    A transcript and its sound are two views of one idea. Subtitles cut the sound at their times:
    text, sound, text, sound, ... with "start" and "end" in seconds; what is in no cue is left out.
    """
    root = root_of(path)
    yield from each(walk(path, SOUNDS), lambda file: _read_sound(file, root))


def _read_sound(file: Path, root: Path) -> Iterator[Item]:
    draft = Draft(str(file), 0, base_of(file, root))
    for suffix in (*SUBTITLES, ".txt"):
        beside = _beside(file, suffix)
        if beside is None:
            continue
        text = read_text(read_inside(root, beside))
        if not text.strip():
            raise UserError(f"empty transcript: {beside} says nothing")
        data = read_inside(root, file)
        if suffix in SUBTITLES:
            _add_cues(draft, text, data)
        else:
            draft.order = "any"
            draft.text(" ".join(text.split()))
            draft.add("audio", file.name, lambda data=data: data)
            if draft.lost:  # a text alone is no document of speech
                raise UserError(draft.lost[0])
        yield draft
        return
    raise UserError(f"no transcript: {file.name} has no .srt, .vtt or .txt beside it")


def _beside(file: Path, suffix: str) -> Path | None:
    """`a.srt`, `a.wav.srt` or (as players name the language) `a.en.srt` for `a.wav`."""
    named = [file.with_suffix(suffix), file.with_name(file.name + suffix)]
    if suffix in SUBTITLES:
        stem = file.stem + "."
        languages = (p for p in file.parent.glob(f"*{suffix}") if p.name.startswith(stem))
        named += sorted(p for p in languages if p.name.count(".") == stem.count(".") + 1)
    return next((path for path in named if path.is_file()), None)


def _add_cues(draft: Draft, text: str, data: bytes) -> None:
    """Alternate the text and the sound of each cue."""
    subtitles = parse(text)
    draft.lost += subtitles.malformed
    try:
        sound = Audio.load(data)
    except UserError as error:
        raise UserError(f"bad audio: {error}") from None
    for cue in subtitles.cues:
        _add_cue(draft, cue, sound)
    if not draft.parts:
        raise UserError("no cues: all are after the end of the sound")


def _add_cue(draft: Draft, cue: Cue, sound: Audio) -> None:
    first, last = (round(time * sound.sample_rate) for time in (cue.start, cue.end))
    wave = sound.wave[first:last]
    if not len(wave):
        draft.lost.append(f"late cue: it starts at {cue.start} s of {sound.seconds:.3f} s")
        return
    times = {"start": cue.start, "end": min(cue.end, round(sound.seconds, 6))}
    draft.text(cue.text, start=times["start"], end=times["end"])
    draft.add_part(wave_part(wave, sound.sample_rate) | times)
