"""`mmpt generate`: the inference API on the command line."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from mmpt.config import UserError, set_override
from mmpt.edit import parse_edit
from mmpt.parts import Message, Part, Text, load_part
from mmpt.pipeline import Pipeline
from mmpt.request import Generate, Request
from mmpt.results import Medium, Method, Result

WORD = re.compile(r":([a-z]+)(?:,(.*))?", re.DOTALL)  # :image,height=32
TURNS = ("user", "assistant")


def generate(
    model: Path,
    parts: list[str],
    *,
    to: Medium = "image",
    out: Path | None = None,
    plan: bool = False,
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
    """Generate parts from PARTS: texts, files such as cat.png and hello.wav, and slots to fill.

    One answer of one medium, from words or from a file:

        mmpt generate MODEL "red apple" --to image --out apple.png
        mmpt generate MODEL apple.png --to text

    Several: :text :image :video :speech stand where the model writes, with settings of their own,
    and :any where it decides itself what comes. Each sees what stands before it; --out is a folder:

        mmpt generate MODEL "A red apple:" :image,height=32 "It says" :speech --out story/

    A conversation: :user and :assistant begin turns.

        mmpt generate MODEL :user apple.png "What is it?" :assistant :text

    MODEL is a model folder or a run. Text is printed; other media are saved at --out. --plan says
    what it would take, and generates nothing. --setting: other settings as key=value, such as
    sampler=maskgit or context=512. --edit: a file of which --redo is made anew: TOP,LEFT,HEIGHT,
    WIDTH in pixels, or START,STOP in seconds.
    """
    if edit is None and redo:
        raise UserError("--redo says what of a file is made anew; name it with --edit FILE")
    items = read_items(parts)
    slots = [item for item in items if isinstance(item, Generate)]
    if slots and edit is not None:
        raise UserError("--edit is of calls without slots; leave out the words with a colon")
    silent = all(slot.medium == "text" for slot in slots) if slots else to == "text"
    if out is None and not plan and (not silent or edit is not None):
        made = "media" if slots else to
        raise UserError(f"the result will be {made}; say where to save it with --out FILE")
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
    if edit is not None:
        settings["decoder"] = "dida"
        items.append(Generate(edit=parse_edit(load_part(edit), redo)))
    elif not slots:
        items.append(Generate(to))
    request = Request.of(items, seed=seed, settings=settings)
    pipeline = Pipeline.load(model)
    if plan:
        return pipeline.plan(*request.items, seed=seed).to_json()
    [result] = pipeline.answer([request])
    return _saved(result, out) | result.provenance()


def read_items(words: Sequence[str]) -> list[Part | Message | Generate]:
    """What the words of a command line stand for: parts, slots, and the turns of a conversation."""
    items: list[Part | Message | Generate] = []
    turn, said = "", []
    for word in [*words, ":"]:
        begins = word[1:] in TURNS and word.startswith(":")
        ends = begins or word == ":" or (turn == "assistant" and _slot(word) is not None)
        if turn and ends:
            if said:
                items.append(Message(turn, tuple(said)))  # type: ignore[arg-type] # one of TURNS
            turn, said = "", []
        if begins:
            turn = word[1:]
        elif word != ":":
            slot = _slot(word)
            if turn == "user" and slot is not None:
                raise UserError(f"{word} stands in what the user says; write :assistant before it")
            (said if turn else items).append(slot or _read_part(word))  # type: ignore[arg-type] # slots end a turn
    return items


def _slot(word: str) -> Generate | None:
    """:MEDIUM or :MEDIUM,key=value,...; None for other words."""
    match = WORD.fullmatch(word)
    if match is None or match[1] in TURNS:
        return None
    name, media = match[1], (*get_args(Medium), "any")
    if name not in media:
        near = get_close_matches(name, (*media, *TURNS), n=1)
        raise UserError(
            f"{word!r} is no slot; {f'did you mean :{near[0]}?' if near else 'use :image'} (a text "
            "that begins so needs a space before the colon)"
        )
    settings = _parse_settings(match[2].split(",") if match[2] else ())
    return Generate(None if name == "any" else name, **settings)  # type: ignore[arg-type] # a medium, as was checked


def _saved(result: Result, out: Path | None) -> dict[str, Any]:
    """Where parts are, or what they say: one part at `out`, several in it, numbered in order."""
    paths = [] if out is None else result.save(out)
    said = [{"text": part.text} if isinstance(part, Text) else {} for part in result]
    if len(said) == 1 and (out is None or out.suffix):
        return said[0] or {"out": str(out)}
    for row, path in zip(said, paths, strict=False):  # behind the parts comes result.json
        row["out"] = str(path)
    return {"parts": said}


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
