"""Episodes of a small grid world: a mission in words, then a picture and an action for each step.

Levels of minigrid (one room of 8 x 8 tiles) are solved by its expert bot. A tile is 8 pixels wide,
so that one code of an f8 image codec is one tile. Between two pictures stands the word for what the
agent did: a model of the stream is a policy (which word follows) and a world (which picture).
"""

import contextlib
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mmpt.config import UserError
from mmpt.data import importers
from mmpt.data.shards import Record
from mmpt.progress import Bar

logger = logging.getLogger(__name__)

LICENSE = "Apache-2.0"
ATTRIBUTION = [
    {
        "package": "PyPI minigrid",
        "gives": "rooms, missions, pictures, the expert bot",
        "license": "Apache-2.0",
        "copyright": "Farama Foundation and contributors",
        "homepage": "https://minigrid.farama.org",
        "changes": "recorded episodes; frames drawn with tiles of 8 pixels, lossless WebP",
    }
]
LEVELS = {  # of one room of 8 x 8 tiles
    "goto-one": "BabyAI-GoToObj-v0",
    "goto": "BabyAI-GoToLocal-v0",
    "pickup": "BabyAI-PickupLoc-v0",
    "put-next": "BabyAI-PutNextLocal-v0",
}
TILE = 8  # pixels
ACTIONS = ("left", "right", "forward", "pick up", "drop", "open")  # by minigrid's numbers
DONE = "done"


@dataclass(frozen=True)
class Settings:
    """How many episodes, and how much of one is a document."""

    num_episodes: int = 2000
    num_frames: int = 6  # of a document at most: six of 64 codes fit in a row of 512 ids
    max_steps: int = 48  # an episode that takes longer is left out
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """What is seen, pixels uint8 (64, 64, 3), what the agent carries, and what it does then."""

    pixels: np.ndarray
    carried: str
    action: str


@dataclass(frozen=True)
class Episode:
    """A solved mission; the action of its last step is DONE."""

    name: str
    mission: str
    steps: tuple[Step, ...]


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write gridworld-train-*.tar and gridworld-heldout-*.tar into `out`; nothing is fetched."""
    settings = settings or Settings()
    records: dict[str, list[Record]] = {}  # by where the episode begins
    left_out: Counter[str] = Counter()
    for number in Bar(range(settings.num_episodes), desc="gridworld", unit="episode"):
        level = list(LEVELS)[number % len(LEVELS)]
        episode = play(level, settings.seed * 1_000_000 + number, settings.max_steps)
        if episode is None:
            left_out["not solved"] += 1
        elif (base := base_of(episode)) in records:
            left_out["the same start and mission as another"] += 1
        else:
            records[base] = list(documents(episode, settings.num_frames))
    counts = ", ".join(f"{count} {why}" for why, count in sorted(left_out.items()))
    logger.info("gridworld: %d episodes left out (%s)", left_out.total(), counts or "none")
    return importers.write_split((r for rows in records.values() for r in rows), out, "gridworld")


def play(level: str, seed: int, max_steps: int) -> Episode | None:
    """What the expert does in the room that `seed` makes; None when the mission is not solved."""
    options = {"render_mode": "rgb_array", "highlight": False, "tile_size": TILE}
    with contextlib.redirect_stdout(io.StringIO()):  # banners, and the rooms that are rejected
        try:
            import gymnasium
            import minigrid  # noqa: F401 # it registers its levels
            from minigrid.utils.baby_ai_bot import BabyAIBot
        except ImportError:
            raise UserError("gridworld needs minigrid; `pip install 'mmpt[gridworld]'`") from None
        world: Any = gymnasium.make(LEVELS[level], **options)
        world.reset(seed=seed)
        bot, steps = BabyAIBot(world), []
        action: Any = None
        for _ in range(max_steps):
            pixels, carried = world.render(), _carried(world.unwrapped)
            action = bot.replan(action)
            steps.append(Step(pixels, carried, ACTIONS[action]))
            _, reward, solved, stopped, _ = world.step(action)
            if solved and reward > 0:
                steps.append(Step(world.render(), _carried(world.unwrapped), DONE))
                return Episode(f"{level}-{seed}", world.unwrapped.mission, tuple(steps))
            if solved or stopped:
                break
    return None


def base_of(episode: Episode) -> str:
    """The base key: episodes that begin alike with one mission are on one side of the split."""
    start = episode.mission.encode() + episode.steps[0].pixels.tobytes()
    return "gridworld-" + hashlib.sha256(start).hexdigest()[:16]


def documents(episode: Episode, num_frames: int) -> Iterator[Record]:
    """Pieces of an episode; one begins with the picture that the piece before it ended with.

    "The ball on your left" holds for where the episode began: of such a mission there is one piece.
    """
    if num_frames < 2:
        raise UserError(f"num_frames = {num_frames}; needs at least 2: before and after an action")
    base, steps = base_of(episode), episode.steps
    for number, first in enumerate(range(0, max(1, len(steps) - 1), num_frames - 1)):
        if first and " you" in episode.mission:
            return
        piece = steps[first : first + num_frames]
        mission = episode.mission + (f", carrying {piece[0].carried}" if piece[0].carried else "")
        parts: list[dict[str, Any]] = [{"type": "text", "text": mission}]
        for step in piece:
            parts.append({"type": "image", "suffix": "webp", "data": _encode(step.pixels)})
            parts.append({"type": "text", "text": step.action})
        if piece[-1].action != DONE:
            parts.pop()  # the picture after it stands in the next piece
        key = f"gridworld-{episode.name}-{number}"
        yield Record(key, base, "fixed", tuple(parts), "gridworld", LICENSE, mirror=False)


def _carried(world: Any) -> str:
    """The picture does not show it, so a piece of an episode says it in words."""
    return f"a {world.carrying.color} {world.carrying.type}" if world.carrying else ""


def _encode(pixels: np.ndarray) -> bytes:
    """Lossless: in tiles of 8 pixels the halved colours of lossy WebP would run together."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "webp", lossless=True, method=6)
    return buffer.getvalue()
