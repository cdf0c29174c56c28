"""What a report card compares: ways to keep a medium, and counts that all media have in common.

Legend: Q codebooks, K codes of one codebook.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpt.config import UserError

Metric = float | list[float] | str | None
Block = dict[str, Metric]


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to keep a medium: the codec, its baseline, or its ceiling.

    encode: one medium -> codes int64 (..., Q), or anything where nothing is quantised.
    decode: what `encode` gave -> the medium, of the same shape up to a padded tail.
    sizes: codes of each codebook; empty where nothing is quantised.
    bits: what one position of all codebooks costs; None: the bits of `sizes`.
    """

    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    sizes: tuple[int, ...] = ()
    bits: float | None = None

    @property
    def bits_per_position(self) -> float:
        """Bits of one code in every codebook."""
        return sum(math.log2(size) for size in self.sizes) if self.bits is None else self.bits


class Card(dict):
    """A report card: the codec's block at the top, the other systems' blocks by name.

    As text it is a table with a column for each system.
    """

    def __str__(self) -> str:
        blocks = {"codec": self} | {k: v for k, v in self.items() if isinstance(v, dict)}
        shared = [k for k in self["baseline"] if any(b.get(k) is not None for b in blocks.values())]
        about = [k for k in self if k not in self["baseline"] and k not in blocks]
        lines = [f"{key}: {_words(self[key])}" for key in about if self[key] not in ([], "")]
        rows = [["", *blocks]]
        rows += [[key, *(_words(block.get(key)) for block in blocks.values())] for key in shared]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


class Tally:
    """Sends media through a system one by one, and counts codes, bits, identity and time."""

    KEYS = ("usage", "perplexity", "dead", "identity", "encode_speed", "decode_speed")

    def __init__(self, system: System) -> None:
        self.system = system
        self.counts = [torch.zeros(size, dtype=torch.int64) for size in system.sizes]
        self.bits = 0.0
        self.same = self.total = 0
        self.encode_seconds = self.decode_seconds = 0.0

    @torch.inference_mode()
    def keep(self, medium: Any) -> Any:
        """The medium after it was encoded and decoded."""
        began = time.perf_counter()
        codes = self.system.encode(medium)
        encoded = time.perf_counter()
        made = self.system.decode(codes)
        self.decode_seconds += time.perf_counter() - encoded
        self.encode_seconds += encoded - began
        if self.counts:
            self.count(codes)
            again = self.system.encode(made)[: len(codes)]
            self.same += int((again == codes[: len(again)]).sum())
            self.total += codes.numel()
        return made

    def count(self, codes: Tensor) -> None:
        """Add codes (..., Q) to the histogram and to the bits."""
        flat = codes.reshape(-1, len(self.counts))
        for counts, column in zip(self.counts, flat.unbind(1), strict=True):
            counts += torch.bincount(column, minlength=len(counts))
        self.bits += len(flat) * self.system.bits_per_position

    def metrics(self, amount: float) -> Block:
        """The KEYS, all None where nothing is quantised; amount: media, in the unit of speeds.

        usage: share of all codes that were chosen at least once; perplexity: exp of the entropy of
        a codebook, the mean over codebooks; dead: codes that were never chosen; identity: share of
        codes that are the same after decoding and encoding again.
        """
        block: Block = dict.fromkeys(self.KEYS)
        if self.counts:
            used = sum(int((counts > 0).sum()) for counts in self.counts)
            legal = sum(self.system.sizes)
            block["usage"], block["dead"] = used / legal, legal - used
            block["perplexity"] = sum(map(_perplexity, self.counts)) / len(self.counts)
            block["identity"] = self.same / self.total
            block["encode_speed"] = amount / max(self.encode_seconds, 1e-9)
            block["decode_speed"] = amount / max(self.decode_seconds, 1e-9)
        return block


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _perplexity(counts: Tensor) -> float:
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp())


def mean(values: Iterable[float]) -> float | None:
    """The mean; None of nothing."""
    kept = list(values)
    return sum(kept) / len(kept) if kept else None


def rounded(block: Block) -> Block:
    """What a card shows of a block: four decimals are more than any of its measures is worth."""
    return {key: _rounded(value) for key, value in block.items() if key != "system"}


def require(*modules: str) -> None:
    """Refuse to begin without the optional packages that a card needs."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        raise UserError(f"a report card needs {' and '.join(absent)}: pip install 'mmpt[eval]'")


def _rounded(value: Metric) -> Metric:
    if isinstance(value, list):
        return [round(item, 4) for item in value]
    return round(value, 4) if isinstance(value, float) else value
