"""Conversations made of prepared data sets: what is asked for is what is answered."""

from pathlib import Path

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data import sources
from mmpt.data.edits import edit_pixels, on_colour
from mmpt.data.indexed import samples_of
from mmpt.data.inspect import inspect, prepare
from mmpt.data.interleave.cuts import Original
from mmpt.data.shards import Document, encode_document, is_heldout, write_shard
from mmpt.parts import Audio, Image, Part, Text

instructions = sources.load_script("instructions")
emoji = sources.load_script("emoji")

TONES = ("", "-1f3fb", "-1f3ff")


def picture(seed: int) -> Image:
    """Something coloured on white, the left side unlike the right one."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    colours = np.random.default_rng(seed).integers(0, 150, (2, 3))
    pixels[8:20, 6:16], pixels[12:26, 16:24] = colours
    return Image(pixels)


def sound(seed: int, seconds: float = 0.2) -> Audio:
    rng = np.random.default_rng(seed)
    return Audio(rng.normal(0, 0.1, int(16_000 * seconds)).astype(np.float32), 16_000)


def write_sources(folder: Path) -> dict[str, str]:
    """A little of each source, of both splits, as their scripts write it; their folders."""

    def write(name: str, documents: list[Document]) -> None:
        for group, held in (("train", False), ("heldout", True)):
            chosen = [encode_document(d) for d in documents if is_heldout(d.base) is held]
            write_shard(folder / name / f"{name}-{group}-0000.tar", chosen)

    def document(source: str, key: str, base: str, *parts: Part, order: str = "any") -> Document:
        return Document(key, base, order, list(parts), source)  # type: ignore[arg-type] # "any" or "fixed"

    people = [f"1f44{n:x}{tone}" for n in range(12) for tone in TONES]
    write(
        "emoji",
        [
            document("emoji", key, emoji.base_of(key), Text(f"hand {key}"), picture(n), sound(n))
            for n, key in enumerate(people)
        ],
    )
    for name in ("prompts", "voices"):
        said = [
            document(name, f"{name}-{n}", f"{name}-{n}", Text(f"{n} birds"), sound(n))
            for n in range(20)
        ]
        said.append(document(name, f"{name}-long", f"{name}-long", Text("long"), sound(0, 9.0)))
        write(name, said)
    actions = ("left", "forward", "pick up", "drop")
    rooms = []
    for n in range(20):
        steps = [p for m, a in enumerate(actions) for p in (picture(9 * n + m), Text(a))]
        parts = [Text("go to the red ball"), *steps, picture(n), Text("done")]
        rooms.append(document("gridworld", f"room-{n}", f"room-{n}", *parts, order="fixed"))
    write("gridworld", rooms)
    return {name: str(folder / name) for name in instructions.SOURCES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_sources(tmp_path_factory.mktemp("sources"))


def settings(folders: dict[str, str], **more: int) -> list[str]:
    values = {**folders, "num_conversations": 200, **more}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def shards(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("out")
    made = prepare("instructions", settings(folders), out=out, cache=out)
    return [Path(path) for path in made["shards"]]


def read(paths: list[Path]) -> list[Original]:
    return [Original.load(item) for path in paths for item in samples_of(path)]  # type: ignore[arg-type] # no damage


def test_every_kind_is_there_and_turns_take_turns_and_end_with_an_answer(shards):
    found = read(shards)
    kinds = {original.record.more["kind"] for original in found}
    assert kinds == set(instructions.Maker({"emoji": ()}, instructions.Settings()).kinds)
    for original in found:
        roles = original.document.roles
        assert original.document.order == "fixed"
        assert (roles[0], roles[-1]) == ("user", "assistant")
    counts = inspect([str(path) for path in shards])
    assert counts["bad_samples"] == 0
    assert counts["turns"]["user"] == counts["turns"]["assistant"] > counts["documents"]


def test_what_a_source_holds_out_is_held_out_and_nothing_else(shards, folders):
    split = {
        original.document.base: path.name.split("-")[1]
        for folder in folders.values()
        for path in Path(folder).glob("*.tar")
        for original in read([path])
    }
    seen = set()
    for path in shards:
        for original in read([path]):
            assert path.name.split("-")[1] == split[original.document.base]
            seen.add(split[original.document.base])
    assert seen == {"train", "heldout"}


def test_equal_seeds_give_equal_bytes_and_others_do_not(shards, folders, tmp_path):
    for name, seed, equal in (("a", 0, True), ("b", 1, False)):
        again = prepare("instructions", settings(folders, seed=seed), out=tmp_path / name)
        ours = [Path(path).read_bytes() for path in again["shards"]]
        assert (ours == [path.read_bytes() for path in shards]) is equal


def test_long_sounds_are_left_out_and_no_idea_is_asked_for_too_often(shards):
    found = read(shards)
    assert not any("long" in original.document.key for original in found)
    asked = [(original.record.more["kind"], original.document.base) for original in found]
    most = instructions.Settings().per_idea
    assert max(asked.count(each) for each in set(asked)) <= most


def test_an_answer_is_what_the_source_has(shards, folders):
    known = {
        entry["data"]
        for folder in folders.values()
        for original in read(sorted(Path(folder).glob("*.tar")))
        for entry in original.record.parts
        if "data" in entry
    }
    made = set()
    for original in read(shards):
        for entry in original.record.parts:
            if "data" in entry and entry["data"] not in known:
                made.add(entry["edit"])  # nothing but an edit is new
    assert "background" in made


def test_a_move_shows_the_room_before_and_after_the_action(shards, folders):
    [paths] = [sorted(Path(folders["gridworld"]).glob("*.tar"))]
    rooms = {original.document.key: original.record.parts for original in read(paths)}
    wording = {said: name for name, all_ in instructions.WORDINGS["moves"].items() for said in all_}
    moves = [o for o in read(shards) if o.record.more["kind"] in ("move", "move-twice")]
    assert moves
    for original in moves:
        kind = original.record.more["kind"]
        room = [
            entry.get("data", entry.get("text"))
            for entry in rooms[original.document.key[len(kind) + 1 :]]
        ]
        said = [wording.get(e.get("text"), e.get("data")) for e in original.record.parts]
        assert any(room[n : n + len(said)] == said for n in range(len(room)))


def test_variants_are_of_one_idea_and_named_by_what_they_show():
    found = {key: (wish, name) for wish, name, key in instructions.variants("1f44b-1f3fb")}
    assert found["1f44b-1f3ff"] == ("tone", "dark")
    found = {key: name for _, name, key in instructions.variants("1f9d1-200d-1f52c")}
    assert found["1f469-200d-1f52c"] == "woman"
    assert found["1f9d1-1f3fd-200d-1f52c"] == "medium"
    assert {emoji.base_of(key) for key in found} == {"emoji-1f9d1-200d-1f52c"}
    couple = "1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff"
    assert list(instructions.variants(couple)) == []


def test_edits_are_what_they_say():
    pixels = picture(0).pixels
    assert np.array_equal(edit_pixels("mirror", pixels)[:, ::-1], pixels)
    assert np.array_equal(edit_pixels("turned", pixels)[::-1], pixels)
    grey = edit_pixels("grey", pixels)
    assert (grey == grey[..., :1]).all()
    small = edit_pixels("smaller", pixels)
    assert (small[:8] == 255).all()
    assert (small[8:24, 8:24] < 200).any()
    inside = pixels.copy()
    inside[10:12, 8:10] = 255  # white, but not around it
    painted = on_colour(inside, (200, 10, 20))
    assert painted is not None
    assert painted[0, 0].tolist() == [200, 10, 20]
    assert (painted[10:12, 8:10] == 255).all()
    assert np.array_equal(painted[16:18, 10:12], inside[16:18, 10:12])
    assert on_colour(np.zeros_like(pixels), (1, 2, 3)) is None


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("red apple", "a red apple"),
        ("empty nest", "an empty nest"),
        ("scissors", "scissors"),
        ("flag: Chad", "flag: Chad"),
        ("Japanese dolls", "Japanese dolls"),
    ],
)
def test_labels_get_their_article(label, said):
    assert instructions.with_article(label) == said


def test_a_source_that_was_not_prepared_is_named_with_the_command(folders, tmp_path):
    missing = settings(folders | {"voices": str(tmp_path)})
    with pytest.raises(UserError, match=r"no voices-\*.tar; mmpt data prepare voices"):
        prepare("instructions", missing, out=tmp_path)
