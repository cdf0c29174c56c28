"""A folder of `transformers`: config.json and safetensors, one file or several with an index.

Only headers are read until a tensor is asked for, so that a file that lies about its sizes costs
nothing. Nothing is unpickled: a folder with .bin files alone is refused.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from mmpt.config import UserError

INDEX = "model.safetensors.index.json"
MOST_JSON = 1 << 26  # bytes
DTYPES = ("F32", "BF16", "F16")


class TensorFiles:
    """The tensors of a folder by name; a context manager, which holds the files open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack, self._files = ExitStack(), {}
        self._left: set[str] = set()  # names that nobody has read yet

    def __enter__(self) -> Self:
        try:
            for path in _paths(self.folder):
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            self._stack.close()
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder} has no readable weights: {reason}") from None
        self._left = set(self._files)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor, which must have this shape and be of floats."""
        if name not in self._files:
            raise UserError(f"{self.folder}: {name} is missing")
        found = self._files[name].get_slice(name)
        if tuple(found.get_shape()) != shape or found.get_dtype() not in DTYPES:
            raise UserError(
                f"{self.folder}: {name} is {found.get_dtype()} {tuple(found.get_shape())}; its "
                f"config.json needs {' or '.join(DTYPES)} {shape}"
            )
        self._left.discard(name)
        return self._files[name].get_tensor(name)

    def check_all_read(self, *, but: Sequence[str]) -> None:
        """Refuse tensors that nothing asked for: what they do would be lost. but: ends of names."""
        if left := [name for name in sorted(self._left) if not name.endswith(tuple(but))]:
            raise UserError(
                f"{self.folder}: {left[0]} is no part of this kind of model, as far as mmpt knows "
                f"it ({len(left)} such tensors)"
            )


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file of a bounded size."""
    try:
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"{path} has more than {MOST_JSON} bytes")
        data = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no table")
    return data


def _paths(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{folder / INDEX} has no weight_map of names")
        found = sorted(set(names.values()))
        if outside := [n for n in found if Path(n).name != n or not n.endswith(".safetensors")]:
            raise UserError(f"{folder / INDEX} names {outside[0]!r}, no safetensors file beside it")
        return [folder / name for name in found]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    say = f"{pickled[0]} is a pickle, which is never read; " if pickled else ""
    raise UserError(
        f"{folder} has no model.safetensors; {say}save it with transformers' save_pretrained"
    )
