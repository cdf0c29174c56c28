"""Rotary positions (RoPE, arXiv 2104.09864): queries and keys turn with where they stand.

On three axes (time, height, width; arXiv 2409.12191) a code of an image or a video stands at its
place in the grid, counted on each axis from where the span begins; any other id, speech too, has
one number on all three. Behind a grid the numbers go on from its longest side. Frequencies take
turns between the axes, so that each has fast and slow ones; without grids it is the plain rotation.

Legend: B batch, T ids, S spans, H heads, W head width.
"""

import math
from dataclasses import dataclass

import torch

from mmpt.model.config import ModelConfig, RopeScaling
from mmpt.stream import SPAN_COLUMNS, Rows
from mmpt.vocab import Modality

GRIDS = (Modality.IMAGE, Modality.VIDEO)


@dataclass(frozen=True)
class Rotary:
    """cos and sin (B, T, 1, W / 2) of each position's angles, computed once per pass."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, position: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> "Rotary":
        """Angles position * base^(-2i / W), in float32 or better.

        position: int64 (B, T), or (B, T, 3) on three axes.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        width = config.width_per_head
        half = torch.arange(0, width, 2, device=position.device, dtype=dtype)
        rate = config.rope_base ** (-half / width)
        if config.rope_scaling is not None:
            rate = _scaled(rate, config.rope_scaling)
        at = position[:, :, None].to(dtype)  # (B, T, 1) or (B, T, 1, 3)
        if position.ndim == 2:
            at = at[..., None]
        else:
            at = at[..., torch.arange(len(rate), device=position.device) % 3]
        angle = at * rate
        return cls(angle.cos(), angle.sin())

    def turn(self, x_BTHW: torch.Tensor) -> torch.Tensor:
        """Rotate the two halves of each head against each other (RoPE, eq. 34)."""
        a, b = x_BTHW.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, a * self.sin + b * self.cos), dim=-1)


def _scaled(rate: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    # waves that fit often enough into the original context stay, those that hardly do are stretched
    turns = scaling.original_max_position_embeddings * rate / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * rate + (1 - kept) * rate / scaling.factor


def axes_of(rows: Rows) -> torch.Tensor:
    """int64 (B, L, 3): where each id of packed rows stands, on the device of the rows.

    Spans are those of the table: in one that is cut, which no table lists, ids are counted on.
    """
    position, device = rows.position, rows.position.device
    row, start, length, sides = _grids(rows.spans)
    # by how much a grid has more ids than its longest side: the numbers behind it are less by that
    less = torch.zeros(len(position), position.shape[1] + 1, dtype=torch.int64, device=device)
    behind, amount = (x.to(device) for x in (start + length, length - sides.amax(0)))
    less[row.to(device), behind] = amount
    less = less[:, :-1].cumsum(1)
    first = torch.arange(position.shape[1], device=device) - position  # of the id's document
    axes = (position - less + less.gather(1, first))[..., None].repeat(1, 1, 3)
    span = torch.repeat_interleave(torch.arange(len(row)), length)
    place = torch.arange(len(span)) - (length.cumsum(0) - length)[span]
    _, height, width = sides[:, span]
    within = torch.stack((place // (height * width), place // width % height, place % width), 1)
    row, start, place, within = (x.to(device) for x in (row[span], start[span], place, within))
    axes[row, start + place] = axes[row, start] + within
    return axes


def _grids(spans: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """row, start, length (S,), sides (3, S) of the spans whose codes stand in grids."""
    columns = dict(zip(SPAN_COLUMNS, spans.T, strict=True))
    chosen = torch.isin(columns["modality"], torch.tensor(GRIDS))
    row, start, length, *sides = (
        columns[name][chosen] for name in ("row", "start", "length", "frames", "height", "width")
    )
    return row, start, length, torch.stack(sides)
