"""The data sets under `data/`: where they are, what they are, and how their scripts are run.

A data set is a folder with a `prepare.py` (its docstring says what it is, `LICENSE` under which
licence, `main(out, cache)` builds it) and a card `README.md`. Only `sampler` holds shards.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from mmpt import hub
from mmpt.config import UserError

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Source:
    """A data set that can be built, or that is here already."""

    name: str
    summary: str
    license: str
    shards: tuple[Path, ...]


def list_sources() -> list[Source]:
    """All data sets by name."""
    return [
        read_source(folder.name)
        for folder in sorted(hub.shipped("data").glob("*"))
        if (folder / "prepare.py").exists()
    ]


def read_source(name: str) -> Source:
    """One data set; raises UserError for a name that has no script here."""
    script = load_script(name)
    summary = (script.__doc__ or "").strip().partition("\n")[0]
    return Source(name, summary, script.LICENSE, tuple(shards_of(name)))


def shards_of(name: str, split: Split | None = None) -> list[Path]:
    """The shards of a data set that lie in its folder, of one split or of both."""
    pattern = "*.tar" if split is None else f"*-{split}-*.tar"
    return sorted((hub.shipped("data") / name).glob(pattern))


def sampler_shards(split: Split | None = None) -> list[Path]:
    """The embedded sampler; raises UserError when this installation has none."""
    shards = shards_of("sampler", split)
    if not shards:
        raise UserError(
            f"no sampler shards in {hub.shipped('data') / 'sampler'}; "
            "build them with `mmpt data prepare sampler`"
        )
    return shards


def load_script(name: str) -> ModuleType:
    """The module of `data/NAME/prepare.py`."""
    path = hub.shipped("data") / name / "prepare.py"
    if not path.exists():
        known = [folder.parent.name for folder in sorted(hub.shipped("data").glob("*/prepare.py"))]
        if not known:
            raise UserError(
                f"{hub.shipped('data')} has no prepare scripts; run this in a checkout of mmpt"
            )
        raise UserError(f"no data set {name!r}; choose one of {', '.join(known)}")
    module_name = f"mmpt_prepare_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it is loaded
    spec.loader.exec_module(module)
    return module


def default_cache() -> Path:
    """Where fetched packages are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mmpt" / "packages"
