"""Episodes of minigrid as documents: what is seen and what is done stand in the order of time."""

import io
import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mmpt.config import UserError
from mmpt.data import sources
from mmpt.data.inspect import prepare
from mmpt.data.shards import Quarantine, is_heldout, read_documents
from mmpt.parts import Image, Text

gridworld = sources.load_script("gridworld")


def step(number: int, action: str, carried: str = "") -> "gridworld.Step":
    return gridworld.Step(np.full((64, 64, 3), number, np.uint8), carried, action)


def episode(*steps: "gridworld.Step", mission: str = "go to a key") -> "gridworld.Episode":
    return gridworld.Episode("goto-1", mission, steps)


def read(record) -> list:
    """Texts as they are, pictures as the value of their first pixel."""
    return [
        part.get("text") or int(np.asarray(PIL.Image.open(io.BytesIO(part["data"])))[0, 0, 0])
        for part in record.parts
    ]


def test_an_action_stands_between_what_was_seen_before_and_after_it():
    [record] = gridworld.documents(episode(step(0, "left"), step(1, "forward"), step(2, "done")), 6)
    assert read(record) == ["go to a key", 0, "left", 1, "forward", 2, "done"]
    assert (record.order, record.mirror) == ("fixed", False)


def test_a_long_episode_goes_on_where_its_piece_ended_and_says_what_is_carried():
    steps = [step(number, "forward", "a red key" * (number > 1)) for number in range(4)]
    records = list(gridworld.documents(episode(*steps, step(4, "done", "a red key")), 3))
    assert [read(record) for record in records] == [
        ["go to a key", 0, "forward", 1, "forward", 2],
        ["go to a key, carrying a red key", 2, "forward", 3, "forward", 4, "done"],
    ]
    assert len({record.key for record in records}) == 2
    assert len({record.base for record in records}) == 1


def test_a_mission_that_names_places_as_seen_from_the_start_has_one_piece():
    steps = [*(step(number, "forward") for number in range(4)), step(4, "done")]
    pieces = gridworld.documents(episode(*steps, mission="pick up the ball on your left"), 3)
    assert len(list(pieces)) == 1


def test_a_piece_holds_two_frames_at_least():
    with pytest.raises(UserError, match="num_frames = 1; needs at least 2"):
        list(gridworld.documents(episode(step(0, "left"), step(1, "done")), 1))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    pytest.importorskip("minigrid")
    out = tmp_path_factory.mktemp("gridworld")
    return gridworld.main(out, out, gridworld.Settings(num_episodes=12, num_frames=8))


def test_the_expert_solves_what_it_is_told(shards):
    documents = list(read_documents(shards, Quarantine()))
    assert len({document.base for document in documents}) == 12
    for document in documents:
        kinds = [type(part) for part in document.parts]
        assert kinds[:2] == [Text, Image]
        assert all(a != b for a, b in itertools.pairwise(kinds))  # they alternate
        assert all(p.pixels.shape == (64, 64, 3) for p in document.parts if type(p) is Image)
        words = {part.text for part in document.parts[2::2]}
        assert words <= {*gridworld.ACTIONS, gridworld.DONE}
        assert is_heldout(document.base) == ("-heldout-" in document.shard)
    assert sum(document.parts[-1] == Text("done") for document in documents) >= 9


def test_an_action_changes_only_the_tiles_that_it_concerns(shards):
    changed = set()
    for document in read_documents(shards, Quarantine()):
        pictures = [part.pixels for part in document.parts if isinstance(part, Image)]
        words = [part.text for part in document.parts[2::2]]
        for before, after, word in zip(pictures, pictures[1:], words, strict=False):
            tiles = (before != after).reshape(8, 8, 8, 8, 3).any((1, 3, 4)).sum()
            changed.add((word, int(tiles)))
    assert {("left", 1), ("right", 1), ("forward", 2)} <= changed
    assert max(tiles for _, tiles in changed) == 2


def test_equal_seeds_give_equal_shards(shards, tmp_path):
    done = prepare("gridworld", ["num_episodes=12", "num_frames=8"], out=tmp_path)
    again = [Path(path) for path in done["shards"]]
    assert [p.name for p in again] == [p.name for p in shards]
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in shards]


def test_a_setting_that_is_not_there_is_a_mistake_of_the_user(tmp_path):
    for name, words in (("gridworld", "unknown key 'episodes'"), ("sampler", "has no settings")):
        with pytest.raises(UserError, match=words):
            prepare(name, ["episodes=12"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
