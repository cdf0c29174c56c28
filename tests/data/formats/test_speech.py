"""Sounds with transcripts and with subtitles."""

import numpy as np
import pytest

from mmpt.data.shards import read_samples
from mmpt.parts import Audio, Text

CUES = """1
00:00:00,250 --> 00:00:00,500
first

2
00:00:00,500 --> 00:00:09,000
second
"""


@pytest.fixture
def folder(tmp_path, sound):
    """speech/a.wav of one second."""
    folder = tmp_path / "speech"
    folder.mkdir()
    (folder / "a.wav").write_bytes(sound())
    return folder


def members(found) -> dict[str, bytes]:
    [sample] = [s for path in found.result["shards"] for s in read_samples(path)]
    return sample.members


def test_a_transcript_and_its_sound_are_two_views_of_one_idea(folder, run):
    (folder / "a.txt").write_text("\ufeffsome  words\n")
    found = run("speech", folder)
    [document] = found.documents
    assert (document.order, document.base) == ("any", "speech/a")
    assert document.parts[0] == Text("some words")
    assert members(found)["1.wav"] == (folder / "a.wav").read_bytes()  # as it was


@pytest.mark.parametrize("name", ["a.srt", "a.wav.srt", "a.en.srt", "a.vtt"])
def test_subtitles_cut_the_sound_at_their_times(folder, run, name):
    text = CUES if name.endswith("srt") else "WEBVTT\n\n" + CUES.replace(",", ".")
    (folder / name).write_text(text)
    (folder / "a.txt").write_text("subtitles say more than a transcript")
    found = run("speech", folder)
    [document] = found.documents
    whole = Audio.load(folder / "a.wav").wave
    first, second = document.parts[1], document.parts[3]
    assert (document.order, document.parts[::2]) == ("fixed", [Text("first"), Text("second")])
    assert np.allclose(first.wave, whole[2000:4000], atol=1e-4)
    assert np.allclose(second.wave, whole[4000:], atol=1e-4)
    described = members(found)["json"].decode()
    assert '"start":0.25,"end":0.5' in described
    assert described.count('"start":0.5,"end":1.0') == 2  # the end of the sound, not of the cue


def test_malformed_and_late_cues_are_counted(folder, run):
    late = "\n3\n00:00:02,000 --> 00:00:03,000\nlate\n\nno cue\n"
    (folder / "a.srt").write_text(CUES.replace("00:00:09", "00:00:01") + late)
    found = run("speech", folder)
    assert len(found.documents[0].parts) == 4
    assert found.result["part_reasons"] == {"malformed cue": 1, "late cue": 1}


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_known_formats_keep_their_bytes(folder, run, sound, kind):
    file = folder / f"a.{kind.lower()}"
    (folder / "a.wav").unlink()
    file.write_bytes(sound(kind=kind))
    (folder / "a.txt").write_text("words")
    assert members(run("speech", folder))[f"1.{kind.lower()}"] == file.read_bytes()


@pytest.mark.parametrize("kind", ["AIFF", "AU"])
def test_other_formats_become_flac(folder, run, sound, kind):
    (folder / "a.wav").rename(folder / f"a.{kind.lower()}")
    (folder / f"a.{kind.lower()}").write_bytes(sound(kind=kind))
    (folder / "a.txt").write_text("words")
    found = run("speech", folder)
    assert members(found)["1.flac"].startswith(b"fLaC")
    assert found.documents[0].parts[1].seconds == 1.0


def test_bad_files_are_left_out_and_the_next_is_read(folder, run, sound):
    def add(name: str, data: bytes, text: str | None, suffix: str = ".txt") -> None:
        (folder / f"{name}.wav").write_bytes(data)
        if text is not None:
            (folder / f"{name}{suffix}").write_text(text)

    add("a", sound(), None)
    add("b", sound(), " \n")
    add("c", b"RIFF no sound", "words")
    add("d", b"RIFF no sound", CUES, ".srt")
    add("e", sound(), "prose", ".srt")
    add("f", sound(0.2), CUES, ".srt")
    add("g", sound(), "good")
    (folder / "h.wav").symlink_to(folder / "a.wav")
    (folder / "h.txt").symlink_to("/etc/passwd")
    found = run("speech", folder)
    assert [document.parts[0].text for document in found.documents] == ["good"]
    assert found.result["reasons"] == {
        "no transcript": 1,
        "empty transcript": 1,
        "bad audio": 2,
        "no cues": 2,
        "outside": 1,
    }
