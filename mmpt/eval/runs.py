"""Training runs as their folders tell of them: `metrics.jsonl`, `evaluations.jsonl`, `recipe.toml`.

Runs may be going on (the last line may be half a one), may be of earlier versions, and may lack
whatever was not recorded then: such values are NaN.
"""

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.page.markup import MODALITIES, finite

WINDOWS = 60  # stretches of a run that expert loads and laps are summed over
COLUMNS = ("step", "tokens", "seconds", "step_tokens", "step_seconds", "lr", "grad_norm", "loss")
Values = dict[str, Any]


@dataclass
class Window:
    """Sums over some steps: expert loads by group (layers, experts), seconds by lap."""

    step: float
    loads: dict[str, np.ndarray] = field(default_factory=dict)
    laps: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    num_steps: int = 0


@dataclass
class Run:
    """What is known of a run. columns: name -> float (steps,), see `COLUMNS`, and more:

    MEDIUM loss and MEDIUM ids for each medium that was there, source NAME, entropy GROUP.
    """

    name: str
    folder: Path
    columns: dict[str, np.ndarray]
    windows: list[Window]
    skipped: list[tuple[int, str]]  # step, reason
    evaluations: list[Values]
    recipe: Values  # flat: "optim.lr" -> 3e-3
    model: Values  # the table of the recipe

    @property
    def num_steps(self) -> int:
        """How many steps are recorded."""
        return len(self.columns["step"])

    def get(self, name: str) -> np.ndarray:
        """A column; NaN where it was not recorded."""
        return self.columns.get(name, np.full(self.num_steps, math.nan))

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names of columns."""
        return [name.removeprefix(prefix) for name in self.columns if name.startswith(prefix)]

    @property
    def media(self) -> list[str]:
        """The media whose loss is known, in their usual order."""
        return [name for name in MODALITIES if f"{name} loss" in self.columns]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Runs with names that differ. Raises UserError in one line for a folder that is none."""
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("the same run is named twice; name each once")
    names = [path.resolve().name for path in paths]
    for parts in range(2, 8):
        if len(set(names)) == len(names):
            break
        names = ["/".join(path.resolve().parts[-parts:]) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(folder: Path, name: str = "") -> Run:
    """One run folder."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        inside = sorted(str(each.parent) for each in folder.glob("*/metrics.jsonl"))
        hint = f"did you mean {' '.join(inside)}" if inside else "give what mmpt train wrote to"
        raise UserError(f"{folder} is no run: it has no metrics.jsonl; {hint}")
    with path.open("rb") as file:
        num_lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    reader = _Reader(num_lines)
    for row in read_lines(path):
        reader.add(row)
    if not reader.rows:
        raise UserError(f"{path} holds no step yet; come back when the run has done one")
    recipe = _recipe(folder)
    model = recipe.get("model")
    return Run(
        name=name or folder.resolve().name,
        folder=folder,
        columns=reader.columns(),
        windows=reader.windows,
        skipped=reader.skipped,
        evaluations=sorted(read_lines(folder / "evaluations.jsonl"), key=lambda row: row["step"]),
        recipe=dict(_flat(recipe)),
        model=model if isinstance(model, dict) else {},
    )


def read_lines(path: Path) -> Iterator[Values]:
    """The whole lines of a file of JSON lines that have a step; none where there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):  # half a line at the end, or where a disk was full
                row = json.loads(line)
                if isinstance(row, dict) and finite(row.get("step")) is not None:
                    yield row


def flops_per_id(model: Values) -> dict[str, float]:
    """Medium -> floating-point operations of training on one of its ids: 6 x its active weights.

    Empty where the recipe has no model that this version can read.
    """
    import torch

    from mmpt.config import from_dict
    from mmpt.model.config import ModelConfig
    from mmpt.model.dispatch import group_table
    from mmpt.model.transformer import Decoder
    from mmpt.vocab import Modality

    known = {each.name for each in fields(ModelConfig)}
    try:
        config = from_dict(ModelConfig, {k: v for k, v in model.items() if k in known})
    except UserError:
        return {}
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.groups = group_table(config)
    return {m.name.lower(): 3.0 * decoder.flops_per_token(m) for m in Modality}


def training_flops(run: Run) -> np.ndarray:
    """float (steps,): operations up to each step; NaN where the model is not known."""
    per_id = flops_per_id(run.model)
    if not per_id:
        return np.full(run.num_steps, math.nan)
    spent = sum(np.nan_to_num(run.get(f"{m} ids")) * per_id[m] for m in run.media)
    return np.cumsum(spent)


class _Reader:
    """Turns lines into columns and windows, so that a long run never stands in memory whole."""

    def __init__(self, num_lines: int) -> None:
        self.rows: list[dict[str, float]] = []
        self.windows: list[Window] = []
        self.skipped: list[tuple[int, str]] = []
        self._per_window = max(math.ceil(num_lines / WINDOWS), 1)
        self._left = num_lines
        self._bad = 0.0

    def add(self, row: Values) -> None:
        values = {name: known for name in COLUMNS if (known := finite(row.get(name))) is not None}
        for medium, each in _table(row.get("modality")).items():
            each = _table(each)
            values[f"{medium} loss"] = _or_nan(each.get("loss"))
            values[f"{medium} ids"] = finite(each.get("tokens")) or 0.0
        for source, share in _table(row.get("sources")).items():
            values[f"source {source}"] = _or_nan(share)
        for group, told in _table(row.get("router")).items():
            layers = [value for value in _table(told).get("entropy", ()) if value is not None]
            values[f"entropy {group}"] = float(np.mean(layers)) if layers else math.nan
        self._note_skipped(row)
        # a short one at the end would be noise: it joins the one before
        full = self.windows and self.windows[-1].num_steps >= self._per_window
        if not self.windows or (full and self._left >= self._per_window / 2):
            self.windows.append(Window(values["step"]))
        self._left -= 1
        self._sum(self.windows[-1], row)
        self.rows.append(values)

    def columns(self) -> dict[str, np.ndarray]:
        names = dict.fromkeys([*COLUMNS, *(name for row in self.rows for name in row)])
        return {
            name: np.array([row.get(name, math.nan) for row in self.rows], float) for name in names
        }

    def _note_skipped(self, row: Values) -> None:
        bad = finite(row.get("bad_steps")) or 0.0
        reason = row.get("skipped")
        if reason or bad > self._bad:  # earlier versions counted only
            self.skipped.append((int(row["step"]), str(reason or "not finite")))
        self._bad = bad

    def _sum(self, window: Window, row: Values) -> None:
        for group, loads in _table(row.get("load")).items():
            array = np.nan_to_num(np.array(loads, dtype=float))
            if array.ndim == 2 and array.size:
                before = window.loads.get(group)
                same = before is not None and before.shape == array.shape
                window.loads[group] = before + array if same else array
        seconds = finite(row.get("step_seconds")) or 0.0
        laps = _table(row.get("laps"))
        if not laps and (data := finite(row.get("data_seconds"))) is not None:  # earlier versions
            laps = {"data": data, "compute": max(seconds - data, 0.0)}
        for name, value in laps.items():
            window.laps[name] = window.laps.get(name, 0.0) + (finite(value) or 0.0)
        window.step, window.seconds = float(row["step"]), window.seconds + seconds
        window.num_steps += 1


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _or_nan(value: object) -> float:
    known = finite(value)
    return math.nan if known is None else known


def _recipe(folder: Path) -> Values:
    try:
        return tomllib.loads((folder / "recipe.toml").read_text())
    except (OSError, ValueError):
        return {}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
