"""Pictures and clips: slots of them, of many rows at once, and edits of one."""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmpt.answer.players import FilmPlayer
from mmpt.answer.rows import Engine, Row, Tick, Ticks, Window, sampling_of, unconditional
from mmpt.config import UserError
from mmpt.decode.ar import block_steps
from mmpt.decode.denoise import denoise_passes
from mmpt.parts import Part
from mmpt.request import Generate
from mmpt.results import Medium, PartDone, PartStart, Preview, Settings
from mmpt.stream import Segment
from mmpt.tokenizers.video import GROUP
from mmpt.vocab import END, Modality

NAMES: dict[Modality, Medium] = {
    Modality.TEXT: "text",
    Modality.IMAGE: "image",
    Modality.VIDEO: "video",
    Modality.SPEECH: "speech",
}


class Grid(NamedTuple):
    """What is to be filled: `given` are the local codes that it begins with, int64 (n, ...);
    `held` ids of all of it, -1 where they are drawn.
    """

    modality: Modality
    shape: tuple[int, ...]
    given: np.ndarray
    held: np.ndarray | None = None


def write_grids(
    engine: Engine, rows: Sequence[Row], slots: Sequence[Generate], *, show: bool
) -> Ticks:
    """A picture or a clip for each row; slots are alike but for what clips begin with."""
    settings = slots[0].chosen
    engine.check_adapted(settings)
    grids = [_grid(engine, slot) for slot in slots]
    modality, shape = grids[0].modality, grids[0].shape
    header = engine.header(modality, shape)
    need = len(header) + int(np.prod(shape)) + 1
    windows = [row.window(need, settings.context).then(header) for row in rows]
    generators = [row.generator for row in rows]
    made = yield from fill(engine, rows, windows, grids, generators, settings, show=show)
    end = engine.vocabulary.structure_id(END[modality])
    for row, (part, ids) in zip(rows, made, strict=True):
        row.finish(part, np.concatenate([header, ids, [end]]))


def fill(
    engine: Engine,
    rows: Sequence[Row],
    windows: Sequence[Window],
    grids: Sequence[Grid],
    generators: Sequence[torch.Generator],
    settings: Settings,
    *,
    show: bool,
) -> Generator[Tick, None, list[tuple[Part, np.ndarray]]]:
    """Behind windows that end with a header; returns each row's part and ids, given ones first."""
    modality, shape = grids[0].modality, grids[0].shape
    before = [engine.vocabulary.ids_of(modality, grid.given.reshape(-1)) for grid in grids]
    windows = [window.then(ids) for window, ids in zip(windows, before, strict=True)]
    options = {
        "modality": modality,
        "length": int(np.prod(shape)) - len(before[0]),
        "sampling": sampling_of(settings),
        "generators": generators,
        "unconditional": unconditional(windows, settings),
    }
    prompts = [window.prompt for window in windows]
    yield from ((row.number, PartStart(NAMES[modality])) for row in rows)
    films = [FilmPlayer(engine, shape[1:]) for _ in rows] if modality == Modality.VIDEO else []
    ids = [np.zeros(0, dtype=np.int64) for _ in rows]
    if settings.decoder == "ar":
        steps, frame = [], int(np.prod(shape[-2:]))
        options["pool"] = engine.pool
        for step in block_steps(engine.model, engine.vocabulary, prompts, **options):
            steps.append(step)
            yield None
            if len(steps) % frame == 0:
                ids = list(torch.stack(steps, dim=1).cpu().numpy())
                yield from _roll(engine, rows, films, before, ids)
    else:
        held = None if grids[0].held is None else [grid.held for grid in grids]
        for passed in denoise_passes(
            engine.model, engine.vocabulary, prompts, denoising=settings, held=held, **options
        ):
            ids = passed.codes
            whole = [each[:n] for each, n in zip(ids, passed.committed, strict=True)]
            yield from _roll(engine, rows, films, before, whole)
            yield None
            for row, first, each in zip(rows, before, ids, strict=True) if show else ():
                part = _part(engine, modality, shape, np.append(first, each))
                yield row.number, Preview(part, passed.done, passed.total)
        yield from _roll(engine, rows, films, before, ids)
    made: list[tuple[Part, np.ndarray]] = []
    for place, row in enumerate(rows):
        whole = np.append(before[place], ids[place])
        if films:
            yield from ((row.number, chunk) for chunk in films[place].flush())
            part = films[place].part
        else:
            part = _part(engine, modality, shape, whole)
        yield row.number, PartDone(part)
        made.append((part, whole))
    return made


def _grid(engine: Engine, slot: Generate) -> Grid:
    if slot.edit is not None:
        segment, redo = slot.edit.encode(engine.processor)
        ids = engine.vocabulary.ids_of(segment.modality, segment.codes)
        held = np.where(redo, -1, ids).reshape(-1)
        return Grid(segment.modality, segment.codes.shape, np.zeros((0, 1, 1), np.int64), held)
    assert slot.medium is not None  # a slot without a medium is not written here
    modality = Modality[slot.medium.upper()]
    shape = engine.shape(modality, slot.chosen)
    if slot.begin is None:
        return Grid(modality, shape, np.zeros((0, 1, 1), dtype=np.int64))
    if (len(slot.begin.frames) - 1) % GROUP:
        raise UserError(f"begin has {len(slot.begin.frames)} frames; give 1 + {GROUP} n, such as 9")
    given = engine.processor.encode_parts([slot.begin])[0].codes
    if given.shape[1:] != shape[1:] or len(given) >= shape[0]:
        chosen = slot.chosen
        raise UserError(
            f"begin has codes {given.shape}, the clip to make {shape}; give less than "
            f"{chosen.frames} of {chosen.height} x {chosen.width} pixels"
        )
    return Grid(modality, shape, given)


def _roll(
    engine: Engine,
    rows: Sequence[Row],
    films: Sequence[FilmPlayer],
    before: Sequence[np.ndarray],
    ids: Sequence[np.ndarray],
) -> Ticks:
    for place, film in enumerate(films):
        codes = _codes(engine, Modality.VIDEO, np.append(before[place], ids[place]))
        yield from ((rows[place].number, chunk) for chunk in film.show(codes))


def _codes(engine: Engine, modality: Modality, ids: np.ndarray) -> np.ndarray:
    codes = engine.vocabulary.codes_of(modality, ids)
    assert codes is not None  # decoders draw legal ids
    return codes


def _part(engine: Engine, modality: Modality, shape: tuple[int, ...], ids: np.ndarray) -> Part:
    # a video that is not finished shows the latent frames that it has
    count = len(ids) // int(np.prod(shape[-2:]))
    grid = (count, *shape[-2:])[-len(shape) :]
    codes = _codes(engine, modality, ids).reshape(grid)
    return engine.processor.decode_segments([Segment(modality, codes)])[0]
