"""Where a region of a part is chosen: a brush over a picture or a clip, two times of a sound."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.edit import Edit
from mmpt.media import open_picture, read_picture
from mmpt.page.cells import picture_uri, render_part
from mmpt.page.markup import number, tag
from mmpt.parts import Audio, Image, Part, Text, Video

MAX_MASK = 1 << 20  # characters of a painted mask


def render_easel(part: Part, place: str) -> str:
    """HTML of the part with what chooses a region of it; `window.mmpt.easel` makes it work."""
    if isinstance(part, Audio):
        lead, region = "Which seconds are made anew?", _stretch(part)
    else:
        assert isinstance(part, Image | Video)
        lead, region = "Paint over what is to be made anew.", _canvas(part)
    wish = tag("input", type="text", name="text", placeholder="What should it be? (may be empty)")
    buttons = [
        tag("button", "Cancel", type="button", data_act="cancel"),
        tag("button", "Make it anew", type="button", data_act="go", class_="primary"),
    ]
    return tag(
        "div",
        tag("p", lead, class_="lead"),
        region,
        wish,
        tag("div", *buttons, class_="row"),
        class_="easel",
        data_part=place,
    )


def read_place(said: Any) -> tuple[int, int, int]:
    """Turn, answer (-1: what was asked) and part that a button names. Raises UserError."""
    try:
        number, answer, *part = map(int, said["part"].split("."))
        return number, answer, part[0] if part else 0
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError("this names no part of the conversation") from None


def read_edit(part: Part, said: Mapping[str, Any]) -> Edit:
    """What the browser says of a region. Raises UserError for what is none."""
    if isinstance(part, Text):
        raise UserError("texts are not edited by region; ask for another one")
    if isinstance(part, Audio):
        try:
            start, stop = float(said["start"]), float(said["stop"])
        except (KeyError, TypeError, ValueError):
            raise UserError("say from which second to which") from None
        return Edit.stretch(part, start=start, stop=stop)
    sides = part.pixels.shape[:2] if isinstance(part, Image) else part.frames.shape[1:3]
    mask = _read_mask(said.get("mask"), sides)
    if not mask.any():
        raise UserError("nothing is painted; paint over what is to be made anew")
    if isinstance(part, Video):
        mask = np.broadcast_to(mask, part.frames.shape[:3]).copy()
    return Edit(part, mask)


def _canvas(part: Image | Video) -> str:
    pixels = part.pixels if isinstance(part, Image) else part.frames[0]
    height, width = pixels.shape[:2]
    picture = tag("img", src=picture_uri(pixels), alt="what is edited", draggable="false")
    brush = tag("canvas", width=width, height=height, aria_label="Paint here")
    return tag("div", picture, brush, class_="frame", style=f"aspect-ratio: {width} / {height}")


def _stretch(part: Audio) -> str:
    most = f"{part.seconds:.2f}"
    fields = [
        tag(
            "label",
            label,
            tag("input", type="number", name=name, min=0, max=most, step=0.1, value=value),
        )
        for label, name, value in (("From", "start", 0), ("to", "stop", most))
    ]
    whole = tag("span", f"of {number(part.seconds)} s")
    return render_part(part, "what is edited") + tag("div", *fields, whole, class_="row")


def _read_mask(data: Any, sides: tuple[int, ...]) -> np.ndarray:
    """bool (height, width): where a PNG, as canvases give it, is white."""
    head, _, packed = data.partition(",") if isinstance(data, str) else ("", "", "")
    if head != "data:image/png;base64" or len(packed) > MAX_MASK:
        raise UserError("nothing is painted; paint over what is to be made anew")
    try:
        picture = base64.b64decode(packed, validate=True)
    except binascii.Error:
        raise UserError("what was painted came in broken; paint again") from None
    with open_picture(picture) as opened:
        if opened.size != (sides[1], sides[0]):
            raise UserError(f"what was painted has {opened.size} pixels, the part has others")
    # nothing is transparent, and so white
    return read_picture(picture)[..., 1] < 128
