"""Notes inside media files: they come back, and nothing that reads the media minds them."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile

from mmpt.config import UserError
from mmpt.metadata import MAX_NOTE
from mmpt.parts import Audio, Image, Video, load_part
from mmpt.provenance import read_note

NOTE = '{"mmpt": 1, "text": "a <b> &amp; \\u732b \\u0000"}'


def make_parts(note: str) -> dict[str, Image | Video | Audio]:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    wave = rng.integers(-9999, 9999, 4001).astype(np.float32) / 32768
    made = {"provenance": lambda: note}
    still, clip = Image(frames[0], **made), Video(frames, 10.0, **made)
    sound = Audio(wave, 8000, **made)
    return {"a.png": still, "a.webp": still, "b.webp": clip, "b.mp4": clip, "c.wav": sound}


@pytest.mark.parametrize("note", [NOTE, "x" * MAX_NOTE], ids=["short", "long"])
@pytest.mark.parametrize("name", make_parts(""))
def test_a_note_comes_back_and_the_medium_is_what_it_is_without(
    name: str, note: str, tmp_path: Path
) -> None:
    noted, plain = make_parts(note)[name], make_parts("")[name]
    noted.save(tmp_path / name)
    plain.save(tmp_path / f"plain-{name}")
    assert read_note(tmp_path / name) == read_note((tmp_path / name).read_bytes()) == note
    assert read_note(tmp_path / f"plain-{name}") is None
    before, after = load_part(tmp_path / f"plain-{name}"), load_part(tmp_path / name)
    for key, value in vars(before).items():
        assert np.array_equal(value, vars(after)[key]) or key == "provenance", key


@pytest.mark.parametrize("name", make_parts(""))
def test_a_note_that_is_too_long_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"save the result as \.json"):
        make_parts("x" * (MAX_NOTE + 1))[name].save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".jpg", ".gif", ".bmp"])
def test_formats_without_room_are_written_without(suffix: str) -> None:
    data = make_parts(NOTE)["a.png"].encode(suffix)
    assert PIL.Image.open(io.BytesIO(data)).size == (16, 16)
    assert read_note(data) is None


def test_other_programs_read_the_sound_to_its_end(tmp_path: Path) -> None:
    make_parts(NOTE)["c.wav"].save(tmp_path / "c.wav")
    assert soundfile.info(tmp_path / "c.wav").frames == 4001


@pytest.mark.parametrize("name", make_parts(""))
def test_cut_and_damaged_files_are_refused_in_one_line_or_have_no_note(name: str) -> None:
    data = make_parts(NOTE)[name].encode(Path(name).suffix)
    rng = np.random.default_rng(1)
    for cut in rng.integers(0, len(data), 40):
        broken = bytearray(data[:cut] if cut % 2 else data)
        broken[int(cut) // 2] ^= 0x55
        with suppress(UserError):
            assert isinstance(read_note(bytes(broken)), str | None)
