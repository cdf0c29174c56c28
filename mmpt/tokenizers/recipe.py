"""How a codec is trained, as a TOML recipe, and the documents that it names."""

import glob
import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from mmpt import hub
from mmpt.config import UserError, load_recipe, to_dict
from mmpt.data.shards import Document, Quarantine, is_heldout, read_documents
from mmpt.parts import Part
from mmpt.tokenizers.base import config_hash
from mmpt.tokenizers.health import HealthConfig
from mmpt.tokenizers.image import ImageCodecConfig
from mmpt.tokenizers.losses import LossConfig
from mmpt.tokenizers.presets import preset_config
from mmpt.tokenizers.speech import PRESETS, SpeechCodecConfig
from mmpt.tokenizers.video import VideoCodecConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CodecRecipe:
    """How a codec is trained. `shards` are patterns under `data/sampler` or paths."""

    kind: Literal["text", "image", "video", "speech"]
    shards: tuple[str, ...]
    seed: int = 0
    steps: int = 1000
    batch: int = 32  # over all processes
    lr: float = 1e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: int = 200
    weight_decay: float = 0.01
    precision: Literal["bf16", "fp32"] = "bf16"
    ema: float = 0.999
    checkpoint_every: int = 500  # steps
    samples_every: int = 500  # steps between pictures of what is rebuilt; 0: none
    log_every: int = 50  # steps
    device: str = "auto"  # the GPU if there is one
    size: int = 64  # image: pixels a side of what is trained on, cut from larger pictures
    num_text: int = 2048  # text: size of the vocabulary
    base: str = ""  # video: the image codec that it extends
    start: str = ""  # a codec of the same shape to go on from; none: random weights
    preset: str = ""  # image, speech: a shape by name, for all that the table does not say
    moved: float = 0.5  # video: share of clips that are still pictures set in motion
    augment: bool = True  # speech: vary speed, loudness and noise
    spelling: float = 0.3  # speech: weight of the text objective
    heldout: tuple[str, ...] = ()  # shards to measure, with the held-out ones beside `shards`
    unseen_voices: tuple[str, ...] = ()  # speech: no shard to train on may hold them
    loss: LossConfig = field(default_factory=LossConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    image: ImageCodecConfig = field(default_factory=ImageCodecConfig)
    video: VideoCodecConfig = field(default_factory=VideoCodecConfig)
    speech: SpeechCodecConfig = field(default_factory=SpeechCodecConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every", "log_every", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        if self.samples_every < 0:
            raise UserError(f"samples_every = {self.samples_every}; use 0 for none, or more")
        if not 0 <= self.moved <= 1:
            raise UserError(f"moved = {self.moved}; it is a share of the clips, from 0 to 1")
        if self.lr <= 0 or self.warmup < 0 or not 0 <= self.ema < 1:
            raise UserError(
                f"lr = {self.lr}, warmup = {self.warmup}, ema = {self.ema}; needs lr above 0, "
                "warmup 0 or more, and ema in [0, 1)"
            )


# what may change when a training goes on: it moves no weight
FREE: dict[str, Any] = {
    "checkpoint_every": 1,
    "samples_every": 0,
    "log_every": 1,
    "device": "",
    "heldout": (),
    "unseen_voices": (),
}


def recipe_hash(recipe: CodecRecipe) -> str:
    """A short hash of all in a recipe that moves a weight."""
    return config_hash(replace(recipe, **FREE))


def load_codec_recipe(path: str | Path, overrides: Sequence[str] = ()) -> CodecRecipe:
    """Read a recipe, and put its preset under what the recipe and the overrides say."""
    recipe = load_recipe(CodecRecipe, path, overrides)
    if not recipe.preset:
        return recipe
    given = _leaves(tomllib.loads(Path(path).read_text()))
    filled = [
        f"{key}={tomli_w.dumps({'value': value}).removeprefix('value = ').strip()}"
        for key, value in _leaves({recipe.kind: to_dict(_preset(recipe))}).items()
        if key not in given
    ]
    return load_recipe(CodecRecipe, path, [*filled, *overrides])


def _preset(recipe: CodecRecipe) -> ImageCodecConfig | SpeechCodecConfig:
    if recipe.kind == "image":
        return preset_config(recipe.preset)
    if recipe.kind != "speech" or recipe.preset not in PRESETS:
        known = f"choose one of {', '.join(PRESETS)}" if recipe.kind == "speech" else "leave it out"
        raise UserError(f"no preset {recipe.preset!r} of {recipe.kind} codecs; {known}")
    return PRESETS[recipe.preset][1]


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        inner = isinstance(value, Mapping)
        found |= _leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def read_parts(patterns: Sequence[str], *, heldout: bool | None = None) -> list[list[Part]]:
    """The parts of every document that `find_documents` finds."""
    return [document.parts for document in find_documents(patterns, heldout=heldout)]


def find_documents(patterns: Sequence[str], *, heldout: bool | None = None) -> list[Document]:
    """Every document in shards that match; patterns are tried under data/sampler.

    heldout: only documents that are held out of all training (True), or only the others (False).
    """
    documents, others = [], 0
    for document in _read(patterns):
        if heldout is None or is_heldout(document.base) == heldout:
            documents.append(document)
        else:
            others += 1
    if others:
        log.info("%d documents of the other split were left out", others)
    return documents


def read_split(patterns: Sequence[str]) -> tuple[list[list[Part]], list[list[Part]]]:
    """The parts of the documents to train on, and of those that are held out."""
    train, heldout = [], []
    for document in _read(patterns):
        (heldout if is_heldout(document.base) else train).append(document.parts)
    if heldout:
        log.info("%d documents are held out", len(heldout))
    return train, heldout


def _read(patterns: Sequence[str]) -> Iterator[Document]:
    quarantine = Quarantine(None)
    yield from read_documents(_find(patterns), quarantine)
    if quarantine.count:
        log.warning("%d bad samples were left out", quarantine.count)


def _find(patterns: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        found = find_shards(pattern)
        if not found:
            raise UserError(
                f"no shard matches {pattern!r} here or in data/sampler; mmpt data list names the "
                "sets that mmpt data prepare builds"
            )
        paths += found
    return paths


def find_shards(pattern: str) -> list[Path]:
    """The shards that match, under data/sampler or here; none is no error."""
    sampler = hub.shipped("data/sampler") if hub.holds("data/sampler") else None
    found = sorted(sampler.glob(pattern)) if sampler and "/" not in pattern else []
    return found or [Path(path) for path in sorted(glob.glob(pattern))]
