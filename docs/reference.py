"""Write the reference of mmpt as HTML pages, from signatures and docstrings: `make reference`.

Run: python docs/reference.py FOLDER [MODULE ...]
"""

import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pdoc
from pdoc import render

import mmpt


def write(folder: Path, modules: Sequence[str] = ()) -> None:
    """Pages of `modules`, or of all; those whose extra is not installed are named and left out."""
    names = [f"mmpt.{each.name}" for each in pkgutil.iter_modules(mmpt.__path__)]
    for name in mmpt.__all__:  # which are loaded when they are used, so that pdoc would miss them
        setattr(mmpt, name, getattr(mmpt, name))
    render.configure(
        docformat="markdown",
        show_source=False,
        template_directory=Path(__file__).parent / "reference",
    )
    pdoc.pdoc(*(modules or ["mmpt", *names]), output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2:])
