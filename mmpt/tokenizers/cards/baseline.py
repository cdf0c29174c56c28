"""The other side of a report card: k-means of raw media, in as many codes and bits as the codec.

Legend: N vectors, D width, K centres, Q codebooks, T frames, H W pixels, t h w codes.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError, write_atomic
from mmpt.tokenizers.codebooks import kmeans, nearest_centre
from mmpt.tokenizers.vocoder import HOP, NUM_MEL, log_mel

MAX_POINTS = 100_000  # vectors that a baseline is fitted on
MAX_CENTRES = 4096  # of one stage; a larger codebook is as many bits in several stages


class KMeans:
    """Vectors (N, D) <-> codes int64 (N, Q): each stage codes what the one before left over."""

    def __init__(self, stages: list[Tensor]) -> None:
        self.stages = stages

    @classmethod
    def fit(cls, groups: Sequence[Tensor], num_centres: int, num_codebooks: int = 1) -> Self:
        """Learn the stages on groups of vectors (n, D). Raises UserError when they are too few."""
        generator = torch.Generator().manual_seed(0)
        left = _sample(groups, generator)
        count = math.ceil(math.log(num_centres) / math.log(MAX_CENTRES))
        num_centres = round(num_centres ** (1 / count))
        stages = []
        for _ in range(num_codebooks * count):
            centres, _ = kmeans(left, num_centres, generator)
            left = left - centres[nearest_centre(left, centres)]
            stages.append(centres)
        return cls(stages)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Centres of each stage."""
        return tuple(len(centres) for centres in self.stages)

    def encode(self, points: Tensor) -> Tensor:
        """The nearest centres of vectors (N, D)."""
        codes, left = [], points
        for centres in self.stages:
            codes.append(nearest_centre(left, centres))
            left = left - centres[codes[-1]]
        return torch.stack(codes, dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """The sums of centres (N, D)."""
        columns = zip(self.stages, codes.unbind(-1), strict=True)
        return torch.stack([centres[column] for centres, column in columns]).sum(0)


class CubeKMeans:
    """Pixels (T, 3, H, W) <-> codes (t, h, w, Q): patches of the first frame, cubes of the rest.

    Both have codebooks of their own; the codes of cubes are counted from K on. A picture is a clip
    of one frame, and where all clips are pictures there are no cubes.
    """

    PATCH = "(t g) c (h p) (w q) -> (t h w) (g c p q)"

    def __init__(self, *, factor: int, group: int) -> None:
        self.factor, self.group = factor, group
        self.patches = self.cubes = KMeans([])

    def fit(self, clips: Sequence[Tensor], num_centres: int, num_codebooks: int) -> None:
        """Learn from clips. Raises UserError when they are too few."""
        first = [self._cut(clip[:1], 1) for clip in clips]
        self.patches = KMeans.fit(first, num_centres, num_codebooks)
        rest = [self._cut(clip[1:], self.group) for clip in clips if len(clip) > 1]
        if rest:
            self.cubes = KMeans.fit(rest, num_centres, num_codebooks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Legal codes of each codebook, of patches and cubes together."""
        cubes = self.cubes.sizes or (0,) * len(self.patches.sizes)
        return tuple(map(sum, zip(self.patches.sizes, cubes, strict=True)))

    @property
    def bits(self) -> float:
        """Of one position: whether it is a patch or a cube is known from its place."""
        return sum(math.log2(size) for size in self.patches.sizes)

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes of 1 + group n frames whose sides are multiples of the factor."""
        height, width = (side // self.factor for side in pixels.shape[-2:])
        codes = self.patches.encode(self._cut(pixels[:1], 1))
        if len(pixels) > 1:
            later = self.cubes.encode(self._cut(pixels[1:], self.group))
            codes = torch.cat([codes, later + torch.tensor(self.patches.sizes)])
        return rearrange(codes, "(t h w) k -> t h w k", h=height, w=width)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes."""
        grid = (codes.shape[1], codes.shape[2])
        frames = [self._join(self.patches.decode(codes[:1].flatten(0, 2)), grid, 1)]
        if len(codes) > 1:
            later = self.cubes.decode(codes[1:].flatten(0, 2) - torch.tensor(self.patches.sizes))
            frames.append(self._join(later, grid, self.group))
        return torch.cat(frames)

    def _cut(self, pixels: Tensor, group: int) -> Tensor:
        return rearrange(pixels, self.PATCH, g=group, p=self.factor, q=self.factor)

    def _join(self, points: Tensor, grid: tuple[int, int], group: int) -> Tensor:
        left, right = self.PATCH.split(" -> ")
        sizes = {"g": group, "p": self.factor, "q": self.factor, "c": 3}
        return rearrange(points, f"{right} -> {left}", h=grid[0], w=grid[1], **sizes)


class FrameKMeans:
    """Waves (N,) <-> codes (n, Q): log-mel frames of one position, stacked.

    voices: who speaks in what it was fitted on; shards: where that is.
    """

    def __init__(
        self, centres: KMeans, *, voices: Sequence[str] = (), shards: Sequence[str] = ()
    ) -> None:
        self.centres = centres
        self.frames = centres.stages[0].shape[1] // NUM_MEL
        self.voices, self.shards = tuple(voices), tuple(shards)

    @classmethod
    def fit(
        cls,
        waves: Sequence[Tensor],
        frames: int,
        num_centres: int,
        num_codebooks: int,
        **known: Sequence[str],
    ) -> Self:
        """Learn from waves at 16 kHz; `known` is voices and shards."""
        points = [_frames(wave, frames) for wave in waves]
        stages = KMeans.fit(points, num_centres, num_codebooks).stages
        # rounded as `save` does, so that a saved one codes alike
        return cls(KMeans([stage.half().float() for stage in stages]), **known)

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"k-means of {self.frames} log-mel frames"

    def encode(self, wave: Tensor) -> Tensor:
        """Codes of a wave, the last position filled with silence."""
        return self.centres.encode(_frames(wave, self.frames))

    def decode(self, codes: Tensor) -> Tensor:
        """Log-mel frames (T, 80) of codes."""
        return rearrange(self.centres.decode(codes), "n (f m) -> (n f) m", m=NUM_MEL)

    def save(self, path: Path) -> None:
        """Write it as safetensors (fp16), atomically."""
        tensors = {f"stage_{i}": stage.half() for i, stage in enumerate(self.centres.stages)}
        known = {"voices": json.dumps(self.voices), "shards": json.dumps(self.shards)}
        write_atomic(path, safetensors.torch.save(tensors, metadata=known))

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote. Raises UserError for another file."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                names = sorted(file.keys(), key=lambda name: int(name.removeprefix("stage_")))
                stages = [file.get_tensor(name).float() for name in names]
                known = {key: json.loads(file.metadata()[key]) for key in ("voices", "shards")}
            return cls(KMeans(stages), **known)
        except (OSError, safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} holds no baseline of sound: {error}") from None


def _frames(wave: Tensor, count: int) -> Tensor:
    mel = log_mel(F.pad(wave, (0, -len(wave) % (count * HOP)))[None])[0]
    return rearrange(mel, "(n f) m -> n (f m)", f=count)


def _sample(groups: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """About MAX_POINTS vectors (N, D): the same share of each group, at random."""
    share = min(1.0, MAX_POINTS / max(1, sum(len(group) for group in groups)))
    kept = []
    for group in groups:
        picks = torch.randperm(len(group), generator=generator)[: math.ceil(share * len(group))]
        kept.append(group[picks])
    return torch.cat(kept)
