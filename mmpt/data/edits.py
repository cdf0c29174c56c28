"""Plain edits of pictures that show a thing on white: what a model can be asked to do with them."""

from collections.abc import Sequence

import numpy as np
import PIL.Image

NEAR_WHITE = 236  # of 255: pictures that were stored with loss are not all white
BACKGROUNDS = 0.15, 0.85  # of a picture: less or more of it means that it has none that can be told


def edit_pixels(name: str, pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 (height, width, 3) after an edit: mirror, turned, grey or smaller."""
    if name == "mirror":
        return np.ascontiguousarray(pixels[:, ::-1])
    if name == "turned":
        return np.ascontiguousarray(pixels[::-1])
    picture = PIL.Image.fromarray(pixels)
    if name == "grey":
        return np.asarray(picture.convert("L").convert("RGB"))
    assert name == "smaller", name
    height, width = pixels.shape[:2]
    page = PIL.Image.new("RGB", (width, height), "white")
    small = picture.resize((width // 2, height // 2), PIL.Image.Resampling.LANCZOS)
    page.paste(small, (width // 4, height // 4))
    return np.asarray(page)


def on_colour(pixels: np.ndarray, colour: Sequence[int]) -> np.ndarray | None:
    """The white around a thing in another colour; None where it cannot be told from the thing.

    It is what is near white and reaches the edge; where the thing fades into it, both are mixed.
    """
    white = pixels.min(axis=2) >= NEAR_WHITE
    around = np.zeros_like(white)
    around[[0, -1]], around[:, [0, -1]] = white[[0, -1]], white[:, [0, -1]]
    while (grown := _grown(around) & white).sum() > around.sum():
        around = grown
    if not BACKGROUNDS[0] < around.mean() < BACKGROUNDS[1]:
        return None
    painted = pixels * (np.array(colour) / 255)
    return np.where(_grown(around)[..., None], painted, pixels).astype(np.uint8)


def _grown(mask: np.ndarray) -> np.ndarray:
    """With the neighbours on four sides."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out
