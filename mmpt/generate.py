"""`mmpt generate`: the inference API on the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpt.config import UserError, set_override
from mmpt.edit import parse_edit
from mmpt.parts import Part, Text, load_part
from mmpt.pipeline import Pipeline
from mmpt.results import Medium, Method


def generate(
    model: Path,
    parts: list[str],
    *,
    to: Medium = "image",
    out: Path | None = None,
    seed: int = 0,
    decoder: Method = "ar",
    guidance: float = 1.0,
    temperature: float = 1.0,
    num_passes: int = 8,
    height: int = 64,
    width: int = 64,
    frames: int = 17,
    max_ids: int = 96,
    setting: Sequence[str] = (),
    edit: Path | None = None,
    redo: str = "",
) -> dict[str, Any]:
    """Generate a part of medium `to` from PARTS: texts, or files such as cat.png and hello.wav.

    MODEL is a model folder or a run. Text is printed; other media are saved at --out. --setting:
    others as key=value, such as sampler=maskgit. --edit: a file of which --redo is made anew:
    TOP,LEFT,HEIGHT,WIDTH in pixels, or START,STOP in seconds.
    """
    if edit is None and redo:
        raise UserError("--redo says what of a file is made anew; name it with --edit FILE")
    if out is None and (to != "text" or edit is not None):
        raise UserError(f"the result will be {to}; say where to save it with --out FILE")
    settings: dict[str, Any] = {
        "decoder": decoder,
        "guidance": guidance,
        "temperature": temperature,
        "num_passes": num_passes,
        "height": height,
        "width": width,
        "frames": frames,
        "max_ids": max_ids,
    }
    settings |= _parse_settings(setting)
    read = [_read_part(text) for text in parts]
    changed = None if edit is None else parse_edit(load_part(edit), redo)
    pipeline = Pipeline.load(model)
    if changed is None:
        result = pipeline(*read, to=to, seed=seed, **settings)
    else:
        settings["decoder"] = "dida"
        result = pipeline(*read, edit=changed, seed=seed, **settings)
    [part] = result
    if out is not None:
        part.save(out)
    shown = {"text": part.text} if isinstance(part, Text) else {"out": str(out)}
    return shown | result.provenance()


def _read_part(text: str) -> Part:
    """A file, where there is one of this name; else the words themselves."""
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null byte
        is_file = False
    return load_part(text) if is_file else Text(text)


def _parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """key=value, with values as in recipes."""
    table: dict[str, Any] = {}
    for text in texts:
        set_override(table, text)
    return table
