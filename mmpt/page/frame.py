"""The plane of a chart as inline SVG: two axes, linear or logarithmic, with round numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmpt.page.markup import MINUS, escape, tag

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    raw = (high - low) / max(count - 1, 1)
    if not raw > 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = (index * step for index in range(first, last + 1))
    return [float(f"{value:.10g}") for value in values]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Like `ticks` for a logarithmic axis: powers of ten, between them 2 and 5 where few are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5) if len(decades) > 1 else (1, 2, 3, 5, 7)
    values = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [value for value in values if low * 0.999 <= value <= high * 1.001]
    return inside[:: max(len(inside) // (count + 1), 1)] or [low]


def compact(value: float) -> str:
    """1234567 -> 1.23M; from 1e15 on as a power of ten."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(power)}"
    else:
        scale, unit = next(((s, u) for s, u in PREFIXES if size >= s), (1.0, ""))
        text = f"{value / scale:.3g}{unit}"
    return text.replace("-", MINUS)


def padded(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis a little beyond the values, from 0 when that is not far."""
    span = max(high - low, 1e-3 * max(abs(high), 1e-3))
    floor = 0.0 if 0 <= low < 0.35 * high else low - 0.08 * span
    return floor, high + 0.06 * span


def text_at(x: float | str, y: float, text: str, *, class_: str) -> str:
    """Text at a place, as finished HTML."""
    return tag("text", text, x=x, y=y, class_=class_)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Values `first` to `last` by `low` to `high`, on paper of width x height."""

    last: float
    low: float
    high: float
    first: float = 0.0
    x_unit: str = "steps"
    y_unit: str = "nats"
    log_x: bool = False
    log_y: bool = False
    width: int = 400
    height: int = 224
    left: int = 34
    right: int = 48
    top: int = 22
    bottom: int = 28

    @cached_property
    def _x(self) -> tuple[float, float]:
        return self._span(self.first, self.last, log=self.log_x)

    @cached_property
    def _y(self) -> tuple[float, float]:
        return self._span(self.low, self.high, log=self.log_y)

    def x(self, value: float) -> float:
        low, span = self._x
        share = ((math.log10(value) if self.log_x else value) - low) / span
        return self.left + share * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, span = self._y
        value = min(max(value, self.low), self.high)
        share = ((math.log10(value) if self.log_y else value) - low) / span
        return self.top + (1 - share) * (self.height - self.top - self.bottom)

    def path(self, xs: Iterable[float] | np.ndarray, ys: Iterable[float] | np.ndarray) -> str:
        """The `d` of a line through the points."""
        pairs = zip(xs, ys, strict=True)
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in pairs)

    def area(self, xs: np.ndarray, below: np.ndarray, above: np.ndarray) -> str:
        """The `d` of what lies between two lines."""
        there, back = self.path(xs, above), self.path(xs[::-1], below[::-1])
        return f"{there}L{back[1:]}Z"

    def beside(self, value: float) -> dict[str, str]:
        """Where a label at the right end of a line stands."""
        return {"x": str(self.width - self.right + 7), "y": f"{self.y(value) + 4:.1f}"}

    def axes(self) -> list[str]:
        """Grid lines, numbers and units."""
        below = self.height - 8
        out = [
            text_at(0, 10, escape(self.y_unit), class_="tick start"),
            text_at(self.width, below, escape(self.x_unit), class_="tick end"),
        ]
        for value in (log_ticks if self.log_y else ticks)(self.low, self.high, 6):
            y = f"{self.y(value):.1f}"
            ends = {"x1": self.left, "x2": self.width - self.right, "y1": y, "y2": y}
            out.append(tag("line", **ends, class_="grid"))
            out.append(text_at(self.left - 8, self.y(value) + 4, compact(value), class_="tick end"))
        for value in (log_ticks if self.log_x else ticks)(self.first, self.last, 5):
            if self.x(value) + 16 < self.width - 6 * len(self.x_unit):
                out.append(text_at(f"{self.x(value):.1f}", below, compact(value), class_="tick"))
        return out

    @staticmethod
    def _span(low: float, high: float, *, log: bool) -> tuple[float, float]:
        if log:
            low, high = math.log10(low), math.log10(high)
        return low, (high - low) or 1.0
