"""How a codec is trained, as a TOML recipe, and the documents that it names."""

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mmpt import hub
from mmpt.config import UserError
from mmpt.data.shards import Quarantine, is_heldout, read_documents
from mmpt.parts import Part
from mmpt.tokenizers.image import ImageCodecConfig
from mmpt.tokenizers.speech import SpeechCodecConfig
from mmpt.tokenizers.video import VideoCodecConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CodecRecipe:
    """How a codec is trained. `shards` are patterns under `data/sampler` or paths."""

    kind: Literal["text", "image", "video", "speech"]
    shards: tuple[str, ...]
    seed: int = 0
    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    precision: Literal["bf16", "fp32"] = "bf16"
    ema: float = 0.999
    checkpoint_every: int = 500
    num_text: int = 2048  # text: size of the vocabulary
    base: str = ""  # video: the image codec that it extends
    start: str = ""  # a codec of the same shape to go on from; none: random weights
    augment: bool = True  # speech: vary speed, loudness and noise
    spelling: float = 0.3  # speech: weight of the text objective
    image: ImageCodecConfig = field(default_factory=ImageCodecConfig)
    video: VideoCodecConfig = field(default_factory=VideoCodecConfig)
    speech: SpeechCodecConfig = field(default_factory=SpeechCodecConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        if self.lr <= 0 or self.warmup < 0 or not 0 <= self.ema < 1:
            raise UserError(
                f"lr = {self.lr}, warmup = {self.warmup}, ema = {self.ema}; needs lr above 0, "
                "warmup 0 or more, and ema in [0, 1)"
            )


def read_parts(patterns: Sequence[str], *, heldout: bool | None = None) -> list[list[Part]]:
    """The parts of every document in shards that match; patterns are tried under data/sampler.

    heldout: only documents that are held out of all training (True), or only the others (False).
    """
    quarantine, documents, others = Quarantine(None), [], 0
    for document in read_documents(_find(patterns), quarantine):
        if heldout is None or is_heldout(document.base) == heldout:
            documents.append(document.parts)
        else:
            others += 1
    if quarantine.count:
        log.warning("%d bad samples were left out", quarantine.count)
    if others:
        log.info("%d documents of the other split were left out", others)
    return documents


def _find(patterns: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    sampler = hub.shipped("data/sampler") if hub.holds("data/sampler") else None
    for pattern in patterns:
        found = sorted(sampler.glob(pattern)) if sampler and "/" not in pattern else []
        found = found or [Path(path) for path in sorted(glob.glob(pattern))]
        if not found:
            raise UserError(f"no shard matches {pattern!r} here or in data/sampler")
        paths += found
    return paths
