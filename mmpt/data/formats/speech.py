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
    root, languages = root_of(path), _Languages()
    yield from each(walk(path, SOUNDS), lambda file: _read_sound(file, root, languages))


def _read_sound(file: Path, root: Path, languages: "_Languages") -> Iterator[Item]:
    draft = Draft(str(file), 0, base_of(file, root))
    beside = languages.find(file)
    if beside is None:
        raise UserError(f"no transcript: {file.name} has no .srt, .vtt or .txt beside it")
    text = read_text(read_inside(root, beside))
    if not text.strip():
        raise UserError(f"empty transcript: {beside} says nothing")
    data = read_inside(root, file)
    if beside.suffix in SUBTITLES:
        _add_cues(draft, text, data)
    else:
        draft.order = "any"
        draft.text(" ".join(text.split()))
        draft.add("audio", file.name, lambda: data)
        if draft.lost:  # a text alone is no document of speech
            raise UserError(draft.lost[0])
    yield draft


class _Languages:
    """Finds what is said in a sound; a folder is listed once for all sounds in it."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._named: dict[str, Path] = {}

    def find(self, file: Path) -> Path | None:
        """`a.srt`, `a.wav.srt` or (as players name the language) `a.en.srt` for `a.wav`."""
        for suffix in SUBTITLES:
            for path in (file.with_suffix(suffix), file.with_name(file.name + suffix)):
                if path.is_file():
                    return path
        self._list(file.parent)
        transcript = file.with_suffix(".txt")
        found = self._named.get(file.stem)
        return found or (transcript if transcript.is_file() else None)

    def _list(self, folder: Path) -> None:
        if folder == self._folder:
            return
        self._folder, self._named = folder, {}
        for path in sorted(folder.iterdir()):
            stem, dot, _ = path.stem.rpartition(".")
            if path.suffix in SUBTITLES and dot:
                self._named.setdefault(stem, path)


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
