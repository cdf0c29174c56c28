"""The id space: ranges tile it, every id means one thing, another vocabulary's ids are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.vocab import BEGIN, END, NUM_SIZES, NUM_STRUCTURE, STRUCTURE, Modality, Vocabulary


def test_ranges_tile_the_ids_without_gap_or_overlap(vocabulary: Vocabulary) -> None:
    assert vocabulary.ranges[0].start == vocabulary.num_text + NUM_STRUCTURE + NUM_SIZES
    for before, after in zip(vocabulary.ranges, vocabulary.ranges[1:], strict=False):
        assert before.stop == after.start
    assert len(vocabulary) == vocabulary.ranges[-1].stop


@given(
    num_text=st.integers(256, 5000),
    sizes=st.lists(st.integers(1, 3000), max_size=4),
)
def test_any_vocabulary_gives_every_id_one_meaning(num_text: int, sizes: list[int]) -> None:
    codebooks = [(f"book-{i}", size, {f"m{i}": f"f{i}"}, None) for i, size in enumerate(sizes)]
    vocabulary = Vocabulary.build(num_text=num_text, text_fingerprint="t", codebooks=codebooks)
    structure = {vocabulary.structure_id(name) for name in STRUCTURE}
    side = {vocabulary.size_id(size) for size in range(1, NUM_SIZES + 1)}
    codes = {i for r in vocabulary.ranges for i in range(r.start, r.stop)}
    assert len(structure) == len(STRUCTURE)
    assert len(side) == NUM_SIZES
    assert len(codes) == sum(sizes)
    assert not (structure & side) | (structure & codes) | (side & codes)
    assert min(structure | side | codes) >= num_text
    assert max(structure | side | codes) == len(vocabulary) - 1


def test_image_and_video_share_one_range(vocabulary: Vocabulary) -> None:
    assert vocabulary.range_of(Modality.IMAGE) is vocabulary.range_of(Modality.VIDEO)
    assert vocabulary.range_of(Modality.SPEECH) is not vocabulary.range_of(Modality.IMAGE)
    assert vocabulary.fingerprint_of(Modality.IMAGE) == "image-1"
    assert vocabulary.fingerprint_of(Modality.VIDEO) == "video-1"
    assert vocabulary.fingerprint_of(Modality.TEXT) == "text-1"


def test_sizes_from_1_to_1024_have_an_id_and_no_others(vocabulary: Vocabulary) -> None:
    for size in range(1, NUM_SIZES + 1):
        assert vocabulary.size_of(vocabulary.size_id(size)) == size
    for size in (0, -1, NUM_SIZES + 1):
        with pytest.raises(UserError, match="use 1 to 1024"):
            vocabulary.size_id(size)
    for token in (0, vocabulary.structure_id("<boi>"), vocabulary.range_of(Modality.IMAGE).start):
        assert vocabulary.size_of(token) is None


def test_allowed_masks_separate_the_media(vocabulary: Vocabulary) -> None:
    allowed = vocabulary.allowed
    assert set(allowed) == set(Modality)
    assert all(mask.shape == (len(vocabulary),) for mask in allowed.values())
    for modality in (Modality.IMAGE, Modality.VIDEO, Modality.SPEECH):
        codes = vocabulary.range_of(modality)
        assert np.flatnonzero(allowed[modality]).tolist() == list(range(codes.start, codes.stop))
    text = allowed[Modality.TEXT]
    assert text[: vocabulary.num_text].all()
    assert all(text[vocabulary.structure_id(name)] for name in STRUCTURE)
    assert all(text[vocabulary.size_id(size)] for size in (1, NUM_SIZES))
    reserved = slice(vocabulary.num_text + len(STRUCTURE), vocabulary.num_text + NUM_STRUCTURE)
    assert not text[reserved].any()  # no id that has no meaning yet is ever drawn
    assert not text[vocabulary.ranges[0].start :].any()


def test_codes_that_were_never_used_are_not_allowed() -> None:
    vocabulary = Vocabulary.build(
        num_text=300,
        text_fingerprint="t",
        codebooks=[
            ("visual", 8, {"image": "i", "video": "v"}, [0, 5]),
            ("s", 4, {"speech": "s"}, []),
        ],
    )
    start = vocabulary.range_of(Modality.IMAGE).start
    for modality in (Modality.IMAGE, Modality.VIDEO):
        assert np.flatnonzero(vocabulary.allowed[modality]).tolist() == [start, start + 5]
    assert not vocabulary.allowed[Modality.SPEECH].any()


def test_used_codes_do_not_change_the_fingerprint_and_everything_else_does() -> None:
    def build(
        num_text: int = 300, text: str = "t", size: int = 8, made_by: str = "i",
        used: list[int] | None = None, name: str = "visual",
    ) -> str:  # fmt: skip
        return Vocabulary.build(
            num_text=num_text,
            text_fingerprint=text,
            codebooks=[(name, size, {"image": made_by}, used)],
        ).fingerprint

    assert build(used=[1, 2]) == build()
    others = [build(301), build(text="u"), build(size=9), build(made_by="j"), build(name="video")]
    assert len({build(), *others}) == 6


def test_what_another_vocabulary_made_is_refused(
    make_vocabulary: Callable[..., Vocabulary],
) -> None:
    ours, theirs = make_vocabulary(), make_vocabulary("image-2")
    ours.check(make_vocabulary().fingerprint, what="a shard")
    with pytest.raises(UserError, match="a shard was made with vocabulary") as caught:
        ours.check(theirs.fingerprint, what="a shard")
    assert "\n" not in str(caught.value)
    assert ours.fingerprint in str(caught.value)
    assert theirs.fingerprint in str(caught.value)


def test_a_medium_without_codec_is_absent(vocabulary: Vocabulary) -> None:
    text_only = Vocabulary.build(num_text=300, text_fingerprint="t", codebooks=[])
    assert len(text_only) == 300 + NUM_STRUCTURE + NUM_SIZES
    assert [text_only.has(modality) for modality in Modality] == [True, False, False, False]
    assert all(vocabulary.has(modality) for modality in Modality)
    assert not text_only.allowed[Modality.IMAGE].any()
    with pytest.raises(UserError, match="no speech codec"):
        text_only.range_of(Modality.SPEECH)


def test_begin_and_end_ids_differ_for_every_medium() -> None:
    names = [*BEGIN.values(), *END.values()]
    assert len(set(names)) == 6
    assert set(names) <= set(STRUCTURE)


def test_a_saved_vocabulary_comes_back(vocabulary: Vocabulary, tmp_path: Path) -> None:
    used = Vocabulary.build(
        num_text=300, text_fingerprint="t", codebooks=[("v", 9, {"image": "i"}, [1, 8])]
    )
    for made in (vocabulary, used):
        made.save(tmp_path / "vocabulary.json")
        loaded = Vocabulary.load(tmp_path / "vocabulary.json")
        assert loaded == made
        assert loaded.fingerprint == made.fingerprint


def test_a_newer_an_edited_and_a_broken_file_are_refused_in_one_line(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = tmp_path / "vocabulary.json"
    vocabulary.save(path)
    saved = json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited["ranges"][0]["size"] += 1
    unused = json.loads(path.read_text())
    unused["ranges"][0]["used"] = [64]
    nameless = {key: value for key, value in saved.items() if key != "fingerprint"}
    for content, message in (
        (json.dumps(saved | {"format_version": 99}).encode(), "format 99.*upgrade"),
        (json.dumps(edited).encode(), "was made with vocabulary"),
        (json.dumps(unused).encode(), "used codes must be in"),
        (json.dumps(nameless).encode(), "no vocabulary file"),
        (json.dumps(saved | {"ranges": None}).encode(), "no vocabulary file"),
        (json.dumps(saved | {"format_version": "1"}).encode(), "no vocabulary file"),
        (b"[1, 2]", "no vocabulary file"),
        (b"{", "no vocabulary file"),
        (b"\xff\xfe\x00", "no vocabulary file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            Vocabulary.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read vocabulary"):
        Vocabulary.load(tmp_path / "absent.json")


def several(count: int = 3, size: int = 8, **changes: object) -> Vocabulary:
    """Speech of `count` codebooks behind one visual codebook."""
    books = [(f"speech-{index}", size, {"speech": "s"}, None) for index in range(count)]
    given = {"num_text": 300, "text_fingerprint": "t", **changes}
    codebooks = [("visual", 5, {"image": "i", "video": "v"}, None), *books]
    return Vocabulary.build(**(given | {"codebooks": codebooks}))  # type: ignore[arg-type] # plain values


def test_one_codebook_a_medium_is_written_as_it_always_was(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build(
        num_text=300,
        text_fingerprint="text-1",
        codebooks=[
            ("visual", 64, {"image": "image-1", "video": "video-1"}, [0, 3]),
            ("speech", 512, {"speech": "speech-1"}, None),
        ],
    )
    vocabulary.save(tmp_path / "vocabulary.json")
    made_by = {"image": "image-1", "video": "video-1"}
    visual = {"name": "visual", "start": 1356, "size": 64, "fingerprints": made_by, "used": [0, 3]}
    speech = {"name": "speech", "start": 1420, "size": 512, "fingerprints": {"speech": "speech-1"}}
    assert json.loads((tmp_path / "vocabulary.json").read_text()) == {
        "format_version": 1,
        "num_text": 300,
        "text_fingerprint": "text-1",
        "structure": list(STRUCTURE),
        "ranges": [visual, speech | {"used": None}],
        "fingerprint": "4dca958ef9e02591",
    }


def test_a_file_without_later_structure_ids_is_the_same_vocabulary(tmp_path: Path) -> None:
    vocabulary, path = several(), tmp_path / "vocabulary.json"
    vocabulary.save(path)
    older = json.loads(path.read_text())
    older["structure"] = older["structure"][: STRUCTURE.index("<user>")]
    path.write_text(json.dumps(older))
    assert Vocabulary.load(path) == vocabulary
    older["structure"][-1] = "<other>"
    path.write_text(json.dumps(older))
    with pytest.raises(UserError, match="made with vocabulary"):
        Vocabulary.load(path)


def test_several_codebooks_have_a_range_each_in_their_order(tmp_path: Path) -> None:
    vocabulary = several()
    ranges = vocabulary.ranges_of(Modality.SPEECH)
    assert [r.name for r in ranges] == ["speech-0", "speech-1", "speech-2"]
    assert [r.start for r in ranges] == [ranges[0].start + 8 * index for index in range(3)]
    assert vocabulary.num_codebooks(Modality.SPEECH) == 3
    assert vocabulary.num_codebooks(Modality.IMAGE) == 1
    assert vocabulary.ranges_of(Modality.IMAGE) == (vocabulary.range_of(Modality.IMAGE),)
    assert vocabulary.fingerprint_of(Modality.SPEECH) == "s"
    with pytest.raises(UserError, match="speech has 3 codebooks"):
        vocabulary.range_of(Modality.SPEECH)
    with pytest.raises(UserError, match="no speech codec"):
        Vocabulary.build(num_text=300, text_fingerprint="t", codebooks=[]).ranges_of(
            Modality.SPEECH
        )
    assert len({several(count).fingerprint for count in (1, 2, 3)}) == 3
    vocabulary.save(tmp_path / "vocabulary.json")
    assert json.loads((tmp_path / "vocabulary.json").read_text())["format_version"] == 2
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary


@given(frames=st.integers(0, 9), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_codes_of_several_codebooks_become_ids_of_their_own_and_come_back(
    frames: int, count: int, seed: int
) -> None:
    vocabulary = several(count)
    codes = np.random.default_rng(seed).integers(0, 8, (2, frames * count))
    ids = vocabulary.ids_of(Modality.SPEECH, codes)
    for place in range(frames * count):
        code_range = vocabulary.ranges_of(Modality.SPEECH)[place % count]
        assert np.array_equal(ids[:, place] - code_range.start, codes[:, place])
    back = vocabulary.codes_of(Modality.SPEECH, ids)
    assert back is not None
    assert np.array_equal(back, codes)


def test_codes_and_ids_of_another_codebook_are_refused() -> None:
    vocabulary = several(2)
    for bad in ([0, 8], [-1, 0]):
        with pytest.raises(UserError, match=r"speech codes must be in \[0, 8\)"):
            vocabulary.ids_of(Modality.SPEECH, np.array(bad))
    for call in (vocabulary.ids_of, vocabulary.codes_of):
        with pytest.raises(UserError, match="3 speech codes are no whole frames of 2"):
            call(Modality.SPEECH, np.zeros(3, dtype=np.int64))
    ids = vocabulary.ids_of(Modality.SPEECH, np.array([1, 2]))
    assert vocabulary.codes_of(Modality.SPEECH, ids[::-1]) is None


def test_only_the_codebook_of_a_position_is_allowed_there() -> None:
    vocabulary = several(3)
    ranges = vocabulary.ranges_of(Modality.SPEECH)
    for place in range(7):
        mask = vocabulary.allowed_at(Modality.SPEECH, place)
        here = ranges[place % 3]
        assert np.flatnonzero(mask).tolist() == list(range(here.start, here.stop))
    every = np.flatnonzero(vocabulary.allowed[Modality.SPEECH])
    assert every.tolist() == list(range(ranges[0].start, ranges[-1].stop))
    one = vocabulary.allowed[Modality.IMAGE]
    assert np.array_equal(vocabulary.allowed_at(Modality.IMAGE, 4), one)
