"""Codes as colours over what they decode to, and the experts of every id, as small pictures.

Legend: t latent frames, h rows, w columns of a grid; N ids, L layers, E experts.
"""

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmpt.page.cells import picture_uri, render_part, spectrogram
from mmpt.page.markup import escape, tag
from mmpt.parts import Audio, Image, Part, Video
from mmpt.processor import Processor
from mmpt.stream import Segment, Stream
from mmpt.tokenizers.video import GROUP
from mmpt.vocab import Modality

SIDE = 256  # pixels of one picture
MAX_FRAMES = 6  # latent frames that are shown of a clip
STRIP = 160  # ids in one row
GOLDEN = 0.6180339887
MAX_NATS = 8.0
GLOW = np.array([255, 60, 172])
# seen on light and on dark; the colours of the page are known to the style sheet alone
HUES = {"text": 0.6, "image": 0.06, "video": 0.44, "speech": 0.86, "structure": 0.12}


class _Piece(NamedTuple):
    """A medium of the stream: speech spans that follow each other are one."""

    modality: Modality
    places: np.ndarray  # of its codes
    grid: tuple[int, int, int]


def span_figures(stream: Stream, nats: np.ndarray, processor: Processor) -> str:
    """Every medium as it decodes, under its codes, and under how little they were expected."""
    out = []
    for piece in _pieces(stream):
        codes = processor.vocabulary.codes_of(piece.modality, stream.ids[piece.places])
        if codes is None:
            continue  # ids of another medium, in a stream that was not made by a grammar
        shape = piece.grid[-1:] if piece.modality == Modality.SPEECH else piece.grid
        shape = shape[1:] if piece.modality == Modality.IMAGE else shape
        [part] = processor.decode_segments([Segment(piece.modality, codes.reshape(shape))])
        sides = "by".join(f" {side} " for side in shape).strip()
        words = f"{piece.modality.name.lower()} at {piece.places[0]}: {sides} codes"
        surprise = nats[piece.places].reshape(piece.grid)
        codes = codes.reshape(piece.grid)
        shown = _sound(part, codes, surprise) if isinstance(part, Audio) else None
        shown = shown or _pictures(part, codes, surprise)
        title = tag("h3", escape(words), class_="kind")
        out.append(title + tag("div", *shown, class_="grids"))
    return "".join(out)


def expert_strips(experts: Mapping[str, np.ndarray], kinds: Sequence[str]) -> str:
    """Row by row of the stream: the kind of each id, and below it the expert of every layer."""
    if not experts:
        return ""
    num_layers = len(next(iter(experts.values())))
    colours = np.zeros((1 + num_layers, len(kinds), 3), dtype=np.uint8)
    for place, kind in enumerate(kinds):
        colours[0, place] = _rgb(HUES[kind], 0.7, 0.85)
        for used in experts.values():
            for layer in np.flatnonzero(used[:, place].any(1)):
                share = (int(used[layer, place].argmax()) + 1) / used.shape[2]
                colours[1 + layer, place] = _rgb(HUES[kind], 0.25 + 0.65 * share, 1 - 0.5 * share)
    rows = [colours[:, at : at + STRIP] for at in range(0, colours.shape[1], STRIP)][:24]
    images = [
        tag(
            "img",
            src=picture_uri(np.ascontiguousarray(row)),
            alt=f"experts of ids from {number * STRIP} on",
            style=f"--rows:{len(row)};width:{100 * row.shape[1] / STRIP:.2f}%",
        )
        for number, row in enumerate(rows)
    ]
    text = (
        f"{STRIP} ids a row, in reading order: the medium of each, and below it, layer by layer, "
        "the first of the experts that saw it; a darker one has a higher number."
    )
    title = tag("h3", "Which expert saw which id", class_="kind")
    return title + tag("p", text, class_="prose") + tag("div", *images, class_="strips")


def _pieces(stream: Stream) -> Iterator[_Piece]:
    open_: _Piece | None = None
    for start, length, modality, grid in stream.spans:
        places = np.arange(start, start + length)
        # between two spans of a sound stand an end, a begin and a size
        follows = open_ is not None and start - open_.places[-1] == 4
        if open_ is not None and open_.modality == modality == Modality.SPEECH and follows:
            places = np.concatenate([open_.places, places])
            open_ = _Piece(modality, places, (1, 1, len(places)))
            continue
        if open_ is not None:
            yield open_
        open_ = _Piece(modality, places, grid)
    if open_ is not None:
        yield open_


def _pictures(part: Part, codes: np.ndarray, nats: np.ndarray) -> list[str]:
    """codes, nats: (t, h, w)."""
    if isinstance(part, Image):
        frames = part.pixels[None]
    else:
        assert isinstance(part, Video)
        frames = part.frames[::GROUP][:MAX_FRAMES]
    size = max(1, SIDE // max(frames.shape[1:3]))
    pictures = frames.repeat(size, 1).repeat(size, 2)
    colours = np.stack([_fit(_colours(each), pictures[0]) for each in codes[: len(frames)]])
    mixed = (0.45 * pictures + 0.55 * colours).astype(np.uint8)
    heat = np.stack(
        [_fit(np.clip(each / MAX_NATS, 0, 1), pictures[0]) for each in nats[: len(frames)]]
    )
    grey = pictures.mean(-1, keepdims=True) * 0.6
    glow = (grey * (1 - heat[..., None]) + GLOW * heat[..., None]).astype(np.uint8)
    named = {"as it decodes": pictures, "codes": colours, "codes over it": mixed, "surprise": glow}
    return [_figure(name, _beside(frames)) for name, frames in named.items()]


def _sound(part: Audio, codes: np.ndarray, nats: np.ndarray) -> list[str]:
    """codes, nats: (1, 1, n)."""
    picture = spectrogram(part)[..., 3]
    row = np.zeros((1, 512, 3), dtype=np.uint8)
    colours = _fit(_colours(codes[0]), row).repeat(24, 0)
    heat = _fit(np.clip(nats[0] / MAX_NATS, 0, 1), row)[..., None]
    glow = ((1 - heat) * 40 + GLOW * heat).astype(np.uint8).repeat(24, 0)
    rows = np.linspace(0, len(picture) - 1, 96).round().astype(int)
    columns = np.linspace(0, picture.shape[1] - 1, 512).round().astype(int)
    tall = picture[rows][:, columns, None] / 255
    under = _fit(_colours(codes[0]), row).repeat(96, 0)
    mixed = (under * (0.25 + 0.75 * tall)).astype(np.uint8)
    player = tag("figure", tag("figcaption", "as it decodes"), render_part(part, "sound"))
    named = {"codes": colours, "codes over its tones": mixed, "surprise": glow}
    return [player, *(_figure(name, image) for name, image in named.items())]


def _figure(name: str, image: np.ndarray) -> str:
    height, width = image.shape[:2]
    picture = tag("img", src=picture_uri(image), alt=name, width=width, height=height)
    return tag("figure", tag("figcaption", escape(name)), picture)


def _beside(frames: np.ndarray) -> np.ndarray:
    if len(frames) == 1:
        return np.ascontiguousarray(frames[0])
    small = frames[:, ::2, ::2]
    return np.ascontiguousarray(np.concatenate(list(small), axis=1))


def _fit(grid: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A grid (h, w, ...) as large as a picture, cell by cell."""
    rows = np.arange(picture.shape[0]) * grid.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * grid.shape[1] // picture.shape[1]
    return grid[rows][:, columns]


def _colours(codes: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3): neighbouring numbers are far apart in hue."""
    flat = [
        _rgb(code * GOLDEN % 1, 0.45 + 0.4 * (code % 7) / 6, 0.6 + 0.35 * (code % 5) / 4)
        for code in codes.flatten().tolist()
    ]
    return np.array(flat, dtype=np.uint8).reshape(*codes.shape, 3)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)
