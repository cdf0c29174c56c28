"""The prepare scripts: their pure parts, and the helpers that fetch and encode."""

import gzip
import io
import itertools
import re
import tarfile

import numpy as np
import PIL.Image
import pytest

from mmpt.config import UserError
from mmpt.data import importers, sources
from mmpt.data.shards import Quarantine, Record, is_heldout, read_documents
from mmpt.parts import Audio, Image, Text, Video

emoji = sources.load_script("emoji")
handbook = sources.load_script("handbook")
prompts = sources.load_script("prompts")
voices = sources.load_script("voices")


def tone(seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def test_opus_is_deterministic_small_and_of_the_same_length():
    wave = tone(1.0)
    data = importers.encode_opus(wave, 16_000)
    assert data == importers.encode_opus(wave, 16_000)
    assert len(data) < 4000
    sound = Audio.load(data)
    assert sound.sample_rate == 16_000
    assert len(sound.wave) == len(wave)
    middle = slice(2000, -2000)
    assert np.corrcoef(sound.wave[middle], wave[middle])[0, 1] > 0.99


def test_other_players_accept_the_rewritten_ogg_pages():
    import av

    data = importers.encode_opus(tone(2.5), 16_000)
    with av.open(io.BytesIO(data)) as container:
        num_samples = sum(frame.samples for frame in container.decode(audio=0))
    assert num_samples / 48_000 == pytest.approx(2.5, abs=0.1)


def test_square_keeps_the_aspect_on_white():
    picture = PIL.Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    pixels = np.asarray(importers.square(picture, 20))
    assert pixels.shape == (20, 20, 3)
    assert (pixels[0] == 255).all()
    assert tuple(pixels[10, 10]) == (255, 0, 0)
    clear = importers.square(PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 4)
    assert (np.asarray(clear) == 255).all()


def test_a_clip_keeps_its_frames_and_one_that_stands_still_is_refused():
    rng = np.random.default_rng(0)
    frames = [PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in "abc"]
    data = importers.encode_clip(frames, milliseconds=100, quality=80)
    video = Video.load(data)
    assert video.frames.shape == (3, 16, 16, 3)
    assert video.fps == pytest.approx(10)
    assert importers.encode_clip([frames[0]] * 3, milliseconds=100, quality=80) is None


def test_write_split_parts_by_base_key_and_cuts_shards_by_size(tmp_path):
    records = [
        Record(f"k{number}", f"b{number // 2}", "any", ({"type": "text", "text": "x"},), "t", "MIT")
        for number in range(200)
    ]
    paths = importers.write_split(records, tmp_path, "t", max_bytes=100_000)
    assert len([path for path in paths if "-train-" in path.name]) > 1
    seen = set()
    for path in paths:
        for document in read_documents([path], Quarantine()):
            assert is_heldout(document.base) is ("-heldout-" in path.name)
            seen.add(document.key)
    assert len(seen) == 200


def test_a_missing_program_is_named_with_the_command_that_installs_it():
    with pytest.raises(UserError, match="apt-get install no-such-program"):
        importers.require_tools("no-such-program")


def test_a_package_in_the_cache_is_not_fetched_and_a_broken_one_is_named(tmp_path):
    with tarfile.open(tmp_path / "scope-thing-1.0.0.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/a.txt")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"hi"))
    folder = importers.fetch_npm("@scope/thing", "1.0.0", tmp_path)
    assert (folder / "a.txt").read_text() == "hi"
    (tmp_path / "other-2.0.0.tgz").write_bytes(gzip.compress(b"no tar at all" * 100)[:60])
    with pytest.raises(UserError, match="delete it"):
        importers.fetch_npm("other", "2.0.0", tmp_path)


def test_a_package_that_climbs_out_of_its_folder_is_refused(tmp_path):
    with tarfile.open(tmp_path / "evil-1.0.0.tgz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../evil.txt"), io.BytesIO())
    with pytest.raises(UserError, match="damaged"):
        importers.fetch_npm("evil", "1.0.0", tmp_path)
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("1f44b-1f3fb", "1f44b"),  # waving hand, light skin
        ("1f3c3-200d-2642", "1f3c3"),  # man running
        ("1f3c3-1f3fd-200d-2640-200d-27a1", "1f3c3"),  # woman running to the right, medium skin
        ("1f469-200d-1f692", "1f9d1-200d-1f692"),  # woman firefighter
        ("1f468-1f3ff-200d-1f692", "1f9d1-200d-1f692"),
        ("1f34e", "1f34e"),
    ],
)
def test_variants_of_an_emoji_have_the_base_key_of_the_idea(key, base):
    assert emoji.base_of(key) == f"emoji-{base}"


@pytest.mark.parametrize(
    ("entry", "mirror"),
    [
        ({"label": "red apple", "group": 4, "subgroup": 42}, True),
        ({"label": "left-facing fist", "group": 1, "subgroup": 19}, False),
        ({"label": "counterclockwise arrows button", "group": 8, "subgroup": 90}, False),
        ({"label": "watch", "group": 5, "subgroup": 58}, False),
        ({"label": "Keyboard", "group": 7, "subgroup": 72}, False),
        ({"label": "bright sun", "group": 5, "subgroup": 59}, True),
    ],
)
def test_what_shows_a_side_a_sign_or_letters_may_not_be_mirrored(entry, mirror):
    assert emoji._may_mirror(entry) is mirror


def test_transcripts_leave_out_what_is_not_speech(tmp_path):
    text = "; comment\n\nbeep: [a tone]\njoin: <beep>\nsilence/1: (1 second)\n"
    text += "letters/at: at [@]\nhi:  Hi: you.\n"
    path = tmp_path / "sounds.txt.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert list(prompts.read_transcripts(path)) == [("letters/at", "at"), ("hi", "Hi: you.")]


def test_prompts_with_the_same_words_have_one_base_key_and_it_is_for_training_if_it_can():
    names = {f"p{number}": "Thank you." for number in range(40)} | {"a": "Thank you", "b": "Hello"}
    bases = prompts.base_keys(names)
    assert len({bases[name] for name in names if name != "b"}) == 1
    assert bases["b"] == "prompt-b"
    assert not is_heldout(bases["a"])


PAGE = """<html><head><title>no</title></head><body><nav>menu</nav>
<div class="x sk-page-content y"><h1>Title<a class="headerlink">P</a></h1><p>One &amp;
  two.</p><script>no()</script>
<img src="../_images/sphx_glr_plot_it_001.png" alt="A fine plot" class="sphx-glr-single-img"/>
<pre>a = 1
  b = 2
</pre><img src="../_images/icon.png" alt="icon"><p>End.</p>
<div class="sphx-glr-footer"><p>footer</p></div></div><p>outside</p></body></html>"""


@pytest.fixture
def page(tmp_path):
    for folder in ("_images", "modules"):
        (tmp_path / folder).mkdir()
    PIL.Image.new("RGB", (200, 100), "red").save(tmp_path / "_images" / "sphx_glr_plot_it_001.png")
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "_images" / "icon.png")
    path = tmp_path / "modules" / "it.html"
    path.write_text(PAGE)
    return path


def test_a_page_becomes_text_and_figures_in_reading_order(page):
    items = handbook.read_page(page)
    texts = [item if isinstance(item, str) else "FIGURE " + item.caption for item in items]
    assert texts == ["Title", "One & two.", "FIGURE A fine plot", "a = 1\n  b = 2", "End."]


def test_a_passage_has_the_base_key_of_the_example_that_drew_its_figure(page):
    [passage] = handbook.cut_page(handbook.read_page(page), "modules-it", handbook.Settings())
    assert passage.base == "handbook-plot_it"
    record = handbook.to_record("key", passage, handbook.Settings())
    assert [part["type"] for part in record.parts] == ["text", "image", "text"]
    assert Image.load(record.parts[1]["data"]).pixels.shape == (64, 64, 3)
    assert record.parts[2]["text"].startswith("A fine plot\na = 1")


def test_no_text_of_a_page_stands_in_two_passages(page):
    figures = [handbook.Figure(page.parent / f"sphx_glr_plot_{name}_001.png", "") for name in "abc"]
    words = [f"word{number:03d}" for number in range(90)]
    items = [*words[:30], figures[0], *words[30:60], figures[1], *words[60:], figures[2]]
    settings = handbook.Settings(max_characters=160)
    passages = list(handbook.cut_page(items, "page", settings))
    texts = [part for passage in passages for part in passage.parts if isinstance(part, str)]
    used = " ".join(texts).split()
    assert len(passages) == 3
    assert len(used) == len(set(used))
    assert used == sorted(used)
    assert all(isinstance(Text(text), Text) and len(text) <= 100 for text in texts)


def test_writing_fewer_shards_again_leaves_no_stale_one(tmp_path):
    def write(number, name="t"):
        part = {"type": "text", "text": "x"}
        keys = [f"k{i}" for i in range(number)]
        records = [Record(key, key, "any", (part,), "t", "MIT") for key in keys]
        return importers.write_split(records, tmp_path, name, max_bytes=100_000)

    other = write(20, "t-other")
    first = write(200)
    (tmp_path / "t-train-mine.tar").write_bytes(b"")
    again = write(20)
    assert len(again) < len(first)
    expected = {path.name for path in (*again, *other)} | {"t-train-mine.tar"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_sampler_that_cannot_be_built_leaves_the_old_one(tmp_path, monkeypatch):
    sampler = sources.load_script("sampler")

    def fail(out, cache, settings):
        raise UserError("no network")

    monkeypatch.setattr(emoji, "main", fail)
    (tmp_path / "emoji-train-0000.tar").write_bytes(b"old")
    with pytest.raises(UserError, match="no network"):
        sampler.main(tmp_path, tmp_path)
    assert (tmp_path / "emoji-train-0000.tar").read_bytes() == b"old"


def test_sentences_are_of_three_to_eight_plain_words_and_each_comes_once():
    sentences = list(itertools.islice(voices.list_sentences(0), 2000))
    assert sentences == list(itertools.islice(voices.list_sentences(0), 2000))
    assert sentences[:20] != list(itertools.islice(voices.list_sentences(1), 20))
    assert len(set(sentences)) == 2000
    assert {len(sentence.split()) for sentence in sentences} <= set(range(3, 9))
    assert all(re.fullmatch("[a-z ]+", sentence) for sentence in sentences)
    assert 100 <= len(set(" ".join(sentences).split())) <= 150


def test_unseen_voices_speak_held_out_sentences_only_and_every_voice_is_heard():
    settings = voices.Settings()
    jobs = [(tuple(said.sentences), said.voice) for said in voices.list_utterances(settings)]
    heldout = [job for job in jobs if is_heldout(voices.base_of(list(job[0])))]
    train = [job for job in jobs if job not in heldout]
    assert len(set(jobs)) == len(jobs)
    assert not set(voices.SEEN_VOICES) & set(voices.UNSEEN_VOICES)
    assert [len(said) for said, _ in train] == [settings.num_joined] * settings.num_train
    assert {len(said) for said, _ in heldout} == {1}
    assert not {s for said, _ in train for s in said} & {s for said, _ in heldout for s in said}
    assert {voice for _, voice in train} == set(voices.SEEN_VOICES)
    assert {voice for _, voice in heldout} == {*voices.SEEN_VOICES, *voices.UNSEEN_VOICES}
    unseen = [job for job in heldout if job[1] in voices.UNSEEN_VOICES]
    assert len(unseen) == settings.num_heldout * settings.num_unseen
    assert len(heldout) - len(unseen) == settings.num_heldout * settings.num_seen


def test_more_voices_say_nothing_that_is_held_out_and_nothing_twice():
    settings = voices.Settings(num_more=300)
    jobs = list(voices.list_more(settings))
    assert 250 < len(jobs) <= 300
    assert jobs == list(voices.list_more(settings))
    assert len({(said.sentences[0], said.voice) for said in jobs}) == len(jobs)
    assert {said.voice for said in jobs} <= {*voices.SEEN_VOICES, *voices.MORE_VOICES}
    assert not set(voices.UNSEEN_VOICES) & {*voices.SEEN_VOICES, *voices.MORE_VOICES}
    grammar = [said.sentences for said in jobs if len(said.sentences) > 1]
    keywords = [said.sentences for said in jobs if len(said.sentences) == 1]
    assert len(grammar) > len(keywords) > 50
    assert not any(is_heldout(voices.base_of([s])) for said in grammar for s in said)
    assert not any(is_heldout(voices.base_of(said.sentences)) for said in jobs)
    assert list(voices.list_more(voices.Settings(num_more=0))) == []


def test_an_utterance_says_who_speaks_and_whether_that_voice_is_unseen(monkeypatch):
    wave = np.zeros(16_000, np.int16)
    wave[5000:8000] = 9000 * np.sin(np.arange(0.5, 3000))
    monkeypatch.setattr(emoji, "synthesize", lambda text, voice, **how: wave)
    for voice, unseen in (("flite:slt", False), ("espeak-ng:en-us+f5", True)):
        record = voices.utterance_record(
            voices.Utterance(["two red birds"], voice), voices.Settings()
        )
        text, sound = record.parts
        assert text == {"type": "text", "text": "two red birds"}
        assert (sound["voice"], sound["unseen"], sound["synthetic"]) == (voice, unseen, True)
        spoken = Audio.load(sound["data"]).wave
        assert len(spoken) == 3000 + 2 * voices.MARGIN
        assert 0.4 < np.abs(spoken).max() < 0.9
        assert record.base == voices.base_of(["two red birds"])
        assert record.key.startswith(f"{record.base}-")


def test_silence_at_the_edges_is_cut_to_a_margin():
    wave = np.zeros(10_000, np.int16)
    wave[400], wave[7000] = 1000, -1000
    trimmed = voices.trim(wave)
    assert len(trimmed) == 7001 + voices.MARGIN
    assert trimmed[400] == 1000


def test_pictures_alone_need_neither_animations_nor_synthesizers(tmp_path, monkeypatch):
    PIL.Image.new("RGBA", (96, 80), "red").save(picture := io.BytesIO(), "webp")
    words = b'[{"hexcode": "1F34E", "label": "red apple"}]'
    for name, path, data in (
        ("lobehub-fluent-emoji-3d-1.1.0", "assets/1f34e.webp", picture.getvalue()),
        ("emojibase-data-17.0.0", "en/data.json", words),
    ):
        with tarfile.open(tmp_path / f"{name}.tgz", "w:gz") as tar:
            (info := tarfile.TarInfo(f"package/{path}")).size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setenv("PATH", "")  # nothing can be fetched or spoken
    settings = emoji.Settings(side=128, num_clips=0, num_spoken=0)
    [path] = emoji.main(tmp_path / "out", tmp_path, settings)
    [document] = read_documents([path], Quarantine(None))
    label, picture = document.parts
    assert isinstance(label, Text)
    assert isinstance(picture, Image)
    assert (label.text, picture.pixels.shape) == ("red apple", (128, 128, 3))
