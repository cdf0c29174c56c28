"""Interleaving: each template does what it says, can be undone, and depends on the key alone."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.data.interleave import (
    InterleaveRecipe,
    Original,
    Tools,
    interleave,
    interleave_document,
    restore,
)
from mmpt.data.interleave.cuts import NoPairError
from mmpt.data.interleave.recipe import NAMES
from mmpt.data.interleave.templates import TEMPLATES
from mmpt.data.shards import Document as Doc
from mmpt.data.shards import (
    Quarantine,
    Record,
    encode_document,
    is_heldout,
    read_documents,
    read_samples,
    write_shard,
)
from mmpt.data.tars import Sample
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.sound import sound_bytes
from mmpt.tokenizers import load

RATE = 8000
SPOKEN = ("speech-text-spans", "streaming", "recognition", "synthesis")


def make_sound(seconds: float, seed: int = 0) -> Audio:
    samples = np.random.default_rng(seed).integers(-32768, 32768, round(seconds * RATE))
    return Audio((samples / 32768).astype(np.float32), RATE)


def make_clip(count: int, seed: int = 0) -> Video:
    frames = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return Video(frames, 10.0)


def make_record(*parts: Part | dict, key: str = "k", order: Any = "any", **more: Any) -> Record:
    """A record of parts; a dict adds keys to the part before it."""
    entries: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, dict):
            entries[-1] |= part
        elif isinstance(part, Audio):  # not FLAC, so that what is cut can be told from what is not
            data = sound_bytes(part.wave, part.sample_rate, ".wav")
            entries.append({"type": "audio", "suffix": "wav", "data": data})
        else:
            entries += encode_document(Doc("", "", "any", [part])).parts
    return Record(key, f"base-{key}", order, tuple(entries), "test", "MIT", more=more)


def spoken(text: str, times: list[list[float]], seed: int = 0, **options: Any) -> Record:
    """A text with word times, and its sound."""
    sound = make_sound(times[-1][1] + 0.1, seed)
    said = Text(text), {"words": times}
    return make_record(*said, sound, {"voice": "someone", "synthetic": True}, **options)


def evenly(count: int) -> list[list[float]]:
    return [[0.3 * k, 0.3 * k + 0.25] for k in range(count)]


def filmed() -> Record:
    said = (Text("now"), {"start": 0.5, "end": 1.0}, Text("then"), {"start": 1.3, "end": 1.8})
    return make_record(*said, make_clip(30), Text("a title"), key="film", order="fixed")


def load_records(path: Path) -> list[Original]:
    return [Original.load(item) for item in read_samples(path) if isinstance(item, Sample)]


def through_shard(tmp_path: Path, *records: Record) -> list[Original]:
    write_shard(tmp_path / "some.tar", records)
    return load_records(tmp_path / "some.tar")


@pytest.fixture
def make(tmp_path):
    """(template, record, key=value...) -> the interleaved document, as it is read from a shard."""

    def made(template: str, record: Record, **options: Any) -> Original:
        recipe = InterleaveRecipe(templates={template: 1.0}, **options)
        [original] = through_shard(tmp_path, record)
        _, new = interleave_document(original, Tools(recipe))
        return through_shard(tmp_path, new)[0]

    return made


def same_parts(ours: Original, theirs: Original) -> bool:
    def content(part: Part):
        names = {Text: "text", Image: "pixels", Video: "frames", Audio: "wave"}
        return getattr(part, names[type(part)])

    pairs = zip(ours.document.parts, theirs.document.parts, strict=True)
    return all(type(a) is type(b) and np.array_equal(content(a), content(b)) for a, b in pairs)


def keys_of(record: Record) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in ("data", "suffix")} for e in record.parts]


def check_restored(tmp_path: Path, made: Original, record: Record) -> None:
    [before] = through_shard(tmp_path, record)
    [after] = through_shard(tmp_path, restore(made.record))
    assert same_parts(after, before)
    assert keys_of(after.record) == keys_of(before.record)
    for field in ("key", "base", "order", "source", "license", "mirror", "more"):
        assert getattr(after.record, field) == getattr(before.record, field)


WORDS = st.lists(
    st.text("abc'\N{LATIN SMALL LETTER E WITH ACUTE}\U0001f600.", min_size=1),
    min_size=3,
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(
    words=WORDS,
    gaps=st.data(),
    template=st.sampled_from([*SPOKEN, "infilling"]),
    seed=st.integers(0, 1000),
)
def test_every_spoken_document_comes_back(tmp_path_factory, words, gaps, template, seed):
    tmp_path = tmp_path_factory.mktemp("shards")
    lengths = st.floats(0.0, 0.3)
    edges = np.cumsum([gaps.draw(lengths) for _ in range(2 * len(words))])
    times = edges.reshape(-1, 2).round(3).tolist()
    spaces = [gaps.draw(st.sampled_from([" ", "\n", "  "])) for _ in words]
    text = "".join(word + space for word, space in zip(words, spaces, strict=True))
    record = spoken(text, times, seed, note={"kept": [1]})
    recipe = InterleaveRecipe(templates={template: 1.0}, seed=seed, mean_words=2, sound_codes=5)
    [original] = through_shard(tmp_path, record)
    try:
        _, new = interleave_document(original, Tools(recipe))
    except NoPairError:  # all words but one are too short to be told apart
        assume(False)
        raise
    [made] = through_shard(tmp_path, new)
    check_restored(tmp_path, made, record)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("template", ["captions-before", "captions-after", "infilling"])
def test_every_document_with_pictures_comes_back(make, tmp_path, template, seed):
    picture = Image(make_clip(1).frames[0])
    record = make_record(
        Text("a red apple"), picture, make_clip(7, 1), make_sound(0.5), key=f"{seed}"
    )
    check_restored(tmp_path, make(template, record, seed=seed), record)


@pytest.mark.parametrize("frames", ["pictures", "clips"])
def test_a_film_with_a_transcript_comes_back(make, tmp_path, frames):
    check_restored(tmp_path, make("frames-with-transcript", filmed(), frames=frames), filmed())


@pytest.mark.parametrize("frames", ["pictures", "clips"])
@pytest.mark.parametrize("starts", [[0.0], [0.0, 0.0], [1.0, 5.0], [0.0, 0.1, 0.2], [9.0, 8.0]])
def test_a_film_whose_rate_only_its_file_knows_comes_back(make, tmp_path, frames, starts):
    times = [x for t in starts for x in (Text(f"at {t}"), {"start": t, "end": t + 0.05})]
    record = make_record(make_clip(17), *times)
    record.parts[0].pop("fps")
    [before] = through_shard(tmp_path, record)
    made = make("frames-with-transcript", record, frames=frames)
    [after] = through_shard(tmp_path, restore(made.record))
    assert same_parts(after, before)
    clips = [original.document.parts[0] for original in (before, after)]
    assert clips[0].fps == clips[1].fps  # type: ignore[union-attr]


def test_a_film_of_one_frame_stays_a_film(make):
    record = make_record(make_clip(1), Text("now"), {"start": 0.0, "end": 1.0})
    made = make("frames-with-transcript", record).document
    assert [type(part) for part in made.parts] == [Video, Text]


def test_what_is_not_cut_keeps_its_bytes(make):
    record = spoken("a b c", evenly(3))
    made = make("recognition", record).record
    assert made.parts[0]["data"] == record.parts[1]["data"]
    assert restore(made).parts[1]["data"] == record.parts[1]["data"]


def test_all_templates_have_a_name_in_recipes():
    assert tuple(TEMPLATES) == NAMES


@pytest.mark.parametrize("count", [2, 3, 10, 37, 100])
def test_the_asked_share_of_words_is_heard(make, count):
    words = [f"w{k}" for k in range(count)]
    made = make("speech-text-spans", spoken(" ".join(words), evenly(count)), mean_words=3)
    heard = [entry["text"] for entry in made.record.parts if entry["type"] == "audio"]
    shown = [part.text for part in made.document.parts if isinstance(part, Text)]
    assert len(" ".join(heard).split()) == max(1, round(0.3 * count))
    assert sorted(" ".join([*heard, *shown]).split()) == sorted(words)  # never a part of a word
    kinds = [type(part) for part in made.document.parts]
    assert all(a is not b for a, b in itertools.pairwise(kinds))


def test_runs_have_about_the_asked_length(make):
    text = " ".join(f"w{k}" for k in range(400))
    heard = [
        len(entry["text"].split())
        for entry in make(
            "speech-text-spans", spoken(text, evenly(400)), mean_words=10
        ).record.parts
        if entry["type"] == "audio"
    ]
    assert 7 < np.mean(heard) < 18  # neighbours are joined


def test_a_run_is_heard_from_the_middle_of_the_pause_before_it(make):
    made = make("speech-text-spans", spoken("a b c d", evenly(4)))
    [sound] = [n for n, part in enumerate(made.document.parts) if isinstance(part, Audio)]
    start, end = made.document.times[sound] or (0, 0)
    first = " a b c d".index(made.record.parts[sound]["text"].strip()) // 2
    assert start == pytest.approx(max(0, 0.3 * first - 0.025))
    assert isinstance(made.document.parts[sound], Audio)
    assert made.document.parts[sound].seconds == pytest.approx(end - start, abs=2e-4)
    assert made.document.voices == ("someone",)


def test_captions_of_a_film_are_heard_or_read_as_a_whole(make, tmp_path):
    texts = [f"caption number {k}" for k in range(10)]
    timed = [x for k, t in enumerate(texts) for x in (Text(t), {"start": k + 5.0, "end": k + 5.9})]
    record = make_record(make_sound(10.5), {"start": 5.0, "end": 15.5}, *timed, order="fixed")
    made = make("speech-text-spans", record)
    heard = [entry for entry in made.record.parts if entry["type"] == "audio"]
    assert len(heard) == 3
    assert all(entry["text"] in texts for entry in heard)
    check_restored(tmp_path, made, record)


def subtitled() -> Record:
    """Captions, each before its sound, as subtitles are read."""
    parts: list[Part | dict] = []
    for k in range(10):
        time = {"start": 2.0 * k, "end": 2.0 * k + 0.5}
        parts += [Text(f"caption {k}"), time, make_sound(0.5, k), time]
    return make_record(Text("a title"), *parts, order="fixed")


@pytest.mark.parametrize("template", SPOKEN)
def test_a_document_of_many_sounds_and_captions_comes_back(make, tmp_path, template):
    made = make(template, subtitled(), mean_words=2)
    check_restored(tmp_path, made, subtitled())
    heard = sum(isinstance(part, Audio) for part in made.document.parts)
    assert heard == (3 if template == "speech-text-spans" else 10)
    begins = [time[0] for time in made.document.times if time]
    assert begins == sorted(begins)


def test_sounds_without_captions_of_their_own_are_kept(make):
    record = make_record(Text("a"), make_sound(0.1), make_sound(0.1))
    with pytest.raises(NoPairError, match="several sounds"):
        make("recognition", record)


def test_streaming_has_13_ids_then_26_codes_in_turn(make):
    text = " ".join(f"word{k}" for k in range(40))
    made = make("streaming", make_record(Text(text), make_sound(28.0)))
    kinds = [type(part) for part in made.document.parts]
    assert kinds == [Text, Audio] * (len(kinds) // 2)
    codec = load("text-2k")
    *pieces, _ = [part.text for part in made.document.parts if isinstance(part, Text)]
    assert {len(codec.encode(piece)) for piece in pieces} == {13}
    *pieces, _ = [part for part in made.document.parts if isinstance(part, Audio)]
    assert {len(piece.wave) for piece in pieces} == {round(26 * 0.08 * RATE)}


@pytest.mark.parametrize(("seconds", "kinds"), [(20.0, [Text, Audio]), (1.0, [Text, Audio, Text])])
def test_what_is_left_over_comes_last_in_streaming(make, seconds, kinds):
    words = 3 if seconds > 1 else 100
    record = make_record(Text(" ".join(f"word{k}" for k in range(words))), make_sound(seconds))
    assert [type(part) for part in make("streaming", record).document.parts] == kinds


def test_recognition_and_synthesis_are_a_sound_and_its_text(make):
    picture = Image(make_clip(1).frames[0])
    record = make_record(Text("said"), Text("about it"), picture, make_sound(1.0))
    first = {name: make(name, record).document.parts for name in ("recognition", "synthesis")}
    assert [type(p) for p in first["recognition"]] == [Audio, Text, Text, Image]
    assert [type(p) for p in first["synthesis"]] == [Text, Audio, Text, Image]
    assert first["recognition"][1] == first["synthesis"][0] == Text("said")


def test_captions_stand_before_or_after(make):
    picture, text = Image(make_clip(1).frames[0]), Text("a cat")
    before = make("captions-before", make_record(picture, text)).document
    after = make("captions-after", make_record(text, picture, make_clip(3))).document
    assert [type(part) for part in before.parts] == [Text, Image]
    assert [type(part) for part in after.parts] == [Image, Video, Text]
    assert (before.order, after.order) == ("fixed", "fixed")


def test_frames_and_words_are_in_time_order(make):
    made = make("frames-with-transcript", filmed()).document
    assert [type(part) for part in made.parts] == [Image, Text, Image, Text, Text]
    first, now, second, then, title = made.parts
    assert (now, then, title) == (Text("now"), Text("then"), Text("a title"))
    frames = make_clip(30).frames
    assert isinstance(first, Image)
    assert isinstance(second, Image)
    assert np.array_equal(first.pixels, frames[0])
    assert np.array_equal(second.pixels, frames[13])  # 1.3 s at 10 frames a second
    clips = make("frames-with-transcript", filmed(), frames="clips").document
    assert [len(part.frames) for part in clips.parts if isinstance(part, Video)] == [13, 17]
    assert clips.times[0] == (0.0, 1.3)


def test_infilling_marks_prefix_suffix_and_middle(make):
    made = make("infilling", make_record(Text("one two three four"), order="fixed")).document
    *_, mark_after, suffix, mark_between, middle = made.parts
    assert made.parts[0] == Text("[before]")
    assert (mark_after, mark_between) == (Text("[after]"), Text("[between]"))
    whole = made.parts[1].text + middle.text + suffix.text  # type: ignore[union-attr]
    assert whole == "one two three four"


def test_a_document_becomes_the_same_in_any_company(tmp_path):
    records = [spoken("a b c d e f", evenly(6), key=f"k{n}") for n in range(4)]
    folders = {}
    for name, chosen in (("all", records), ("few", records[2:0:-1])):
        write_shard(tmp_path / "in" / f"{name}.tar", chosen)
        interleave(
            [str(tmp_path / "in" / f"{name}.tar")], out=tmp_path, template="speech-text-spans"
        )
        folders[name] = {o.record.key: o.record for o in load_records(tmp_path / f"{name}.tar")}
    assert folders["few"] == {key: folders["all"][key] for key in ("k1", "k2")}


def test_seeds_and_keys_draw_other_spans(tmp_path):
    def shown(seed: int, key: str) -> list[str]:
        record = spoken(" ".join("abcdefghij"), evenly(10), key=key)
        tools = Tools(InterleaveRecipe(templates={"speech-text-spans": 1.0}, seed=seed))
        [original] = through_shard(tmp_path, record)
        return [e.get("text", "") for e in interleave_document(original, tools)[1].parts]

    assert len({tuple(shown(seed, "k")) for seed in range(8)}) > 2
    assert len({tuple(shown(0, f"k{n}")) for n in range(8)}) > 2


def test_weights_draw_templates_and_what_fits_is_taken(tmp_path):
    recipe = InterleaveRecipe(
        templates={"recognition": 3.0, "synthesis": 1.0, "frames-with-transcript": 100.0}
    )
    tools, names = Tools(recipe), Counter()
    records = [make_record(Text("a"), make_sound(0.1), key=f"k{n}") for n in range(200)]
    for original in through_shard(tmp_path, *records):
        names[interleave_document(original, tools)[0]] += 1
    assert names.keys() == {"recognition", "synthesis"}
    assert 125 < names["recognition"] < 175


def test_every_sample_is_interleaved_kept_or_quarantined(tmp_path):
    records = [
        spoken("a b c", evenly(3), key="good"),
        make_record(Text("no sound"), key="none"),
        spoken("a b c", evenly(2), key="times"),
        make_record(Text("1984 2001"), make_sound(1.0), key="misfit"),
    ]
    write_shard(tmp_path / "in" / "x-train-0.tar", records)
    broken = (tmp_path / "in" / "x-train-0.tar").read_bytes()
    (tmp_path / "in" / "x-train-0.tar").write_bytes(broken[:-1024] + b"rubbish" * 200)
    out = tmp_path / "out"
    report = interleave([str(tmp_path / "in/x-train-0.tar")], out=out, template="speech-text-spans")
    assert (report["samples"], report["interleaved"], report["kept"]) == (4, 1, 1)
    assert report["kept_because"] == {"no sound": 1}
    lines = (out / "x-train-0.quarantine.jsonl").read_text().splitlines()
    assert len(lines) == report["bad_samples"] == 4
    damage = {"destroyed header": 1, "truncated": 1}
    assert report["reasons"] == {"bad json": 1, "no alignment": 1} | damage
    whys = {json.loads(line)["key"]: json.loads(line)["why"] for line in lines}
    assert whys["times"].startswith("bad json: words must be")
    assert whys["misfit"].startswith("no alignment: ")
    documents = list(read_documents([out / "x-train-0.tar"], Quarantine()))
    assert [document.key for document in documents] == ["good", "none"]
    assert [document.order for document in documents] == ["fixed", "any"]
    assert [document.base for document in documents] == ["base-good", "base-none"]


@pytest.mark.parametrize(
    "times",
    [
        3,
        [],
        [[0, 1]],
        [[0], [0, 1, 2]],
        [[0, 1], [1, "2"], 3],
        [[0, 1], [1, float("nan")]],
        [[0, 1], [1, 10**400]],
        [[0, 1], [-1, 1]],
        [[0, 1], ["a", 1]],
        {"a": 1},
    ],
)
def test_bad_word_times_are_refused(make, times):
    record = make_record(Text("a b"), {"words": times}, make_sound(2.0))
    with pytest.raises(UserError, match=r"words must be a .start, end. in seconds for each of 2"):
        make("speech-text-spans", record)


def test_a_single_word_is_no_span_and_needs_no_alignment(make):
    with pytest.raises(NoPairError, match="fewer than two words"):
        make("speech-text-spans", make_record(Text("1984"), make_sound(1.0)))


def test_captions_without_any_sound_are_refused(make):
    late = {"start": 9.0, "end": 9.5}
    texts = Text("a"), {"start": 0.0, "end": 0.5}, Text("b"), late, Text("c"), late
    with pytest.raises(UserError, match="bad times: a text has no sound"):
        make("speech-text-spans", make_record(make_sound(1.0), *texts, order="fixed"))


def test_a_document_stays_on_its_side_of_the_split(make):
    for n in range(20):
        record = spoken("a b c", evenly(3), key=f"k{n}")
        made = make("speech-text-spans", record).document
        assert is_heldout(made.base) is is_heldout(record.base)


def test_shards_go_there_and_back(tmp_path):
    given = tmp_path / "in" / "a=1-train-0.tar"
    write_shard(given, [spoken("a b c", evenly(3)), filmed()])
    there = interleave([str(given), "ratio=0.5"], out=tmp_path / "there", template="synthesis")
    assert (there["interleaved"], there["kept"]) == (1, 1)
    [path] = there["shards"]
    back = interleave([path], out=tmp_path / "back", restore=True)
    assert back["templates"] == {"restored": 1}
    assert back["kept_because"] == {"not interleaved": 1}
    assert (tmp_path / "back" / given.name).read_bytes() == given.read_bytes()
    again = interleave([path], out=tmp_path / "again", template="synthesis")
    assert again["kept_because"]["interleaved already"] == 1


def test_plain_paired_samples_are_interleaved_too(tmp_path):
    from tests.data.test_shards import png_bytes, write_tar

    members = [("a.txt", b"a cat"), ("a.png", png_bytes(tmp_path))]
    write_tar(tmp_path / "x.tar", members)
    interleave([str(tmp_path / "x.tar")], out=tmp_path / "out", template="captions-after")
    [made] = load_records(tmp_path / "out" / "x.tar")
    assert [type(part) for part in made.document.parts] == [Image, Text]
    assert made.record.parts[0]["data"] == members[1][1]


def test_a_recipe_file_names_several_templates(tmp_path):
    write_shard(tmp_path / "x.tar", [spoken("a b c", evenly(3))])
    (tmp_path / "r.toml").write_text("seed = 3\n[templates]\nsynthesis = 1\nrecognition = 1\n")
    report = interleave([str(tmp_path / "x.tar")], out=tmp_path / "out", recipe=tmp_path / "r.toml")
    assert report["interleaved"] == 1


@pytest.mark.parametrize(
    ("given", "options", "why"),
    [
        ([], {"template": "synthesis"}, "no shards given"),
        (["x.tar"], {}, "give one of --template NAME, --recipe FILE and --restore"),
        (["x.tar"], {"template": "synthesis", "restore": True}, "give one of"),
        (["x.tar"], {"template": "sythesis"}, "no template 'sythesis'; choose one of speech-text"),
        (["x.tar", "rato=1"], {"template": "synthesis"}, "did you mean 'ratio'"),
        (["x.tar", "ratio=0"], {"template": "synthesis"}, "ratio = 0.0; use a share"),
        (["x.tar", "text_ids=0"], {"template": "synthesis"}, "text_ids = 0; use 1"),
        (["x.tar", "templates.synthesis=-1"], {"template": "synthesis"}, "weights from 0 on"),
        (["missing.tar"], {"template": "synthesis"}, "no shard at"),
        (["x.tar", "in/x.tar"], {"template": "synthesis"}, "would be written over"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, given, options, why):
    monkeypatch.chdir(tmp_path)
    write_shard("x.tar", [spoken("a b c", evenly(3))])
    write_shard("in/x.tar", [spoken("a b c", evenly(3))])
    with pytest.raises(UserError, match=why) as caught:
        interleave(given, out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_a_shard_is_never_written_over(tmp_path):
    write_shard(tmp_path / "x.tar", [spoken("a b c", evenly(3))])
    with pytest.raises(UserError, match="would be written over"):
        interleave([str(tmp_path / "x.tar")], out=tmp_path, template="synthesis")


@pytest.mark.parametrize(
    ("template", "given", "why"),
    [
        ("streaming", "text=image-f8", "image-f8 is no tokenizer of text"),
        ("speech-text-spans", "speech=text-2k", "text-2k does not spell"),
        ("speech-text-spans", "speech=speach", "no tokenizer"),
    ],
)
def test_a_codec_that_cannot_serve_is_refused_at_once(tmp_path, template, given, why):
    write_shard(tmp_path / "x.tar", [make_record(Text("a b"), make_sound(1.0))])
    with pytest.raises(UserError, match=why):
        interleave([str(tmp_path / "x.tar"), given], out=tmp_path / "out", template=template)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "notes",
    [None, {}, {"order": "any", "parts": 3}, {"order": "any", "parts": [{"type": "text"}] * 3}],
)
def test_damaged_notes_are_refused(make, notes):
    made = make("synthesis", spoken("a b c", evenly(3)))
    made.record.more["interleaved"] = notes  # type: ignore[index]
    with pytest.raises(UserError, match="no interleaved document"):
        restore(made.record)
