"""`mmpt inspect`: the ids of a result on one page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError, write_atomic
from mmpt.eval.page.stream import Look, render
from mmpt.eval.routes import measure, read_stream
from mmpt.parts import Part, Text, load_part
from mmpt.pipeline import Pipeline
from mmpt.processor import Processor
from mmpt.provenance import Provenance, Recording, read_recording
from mmpt.replay import name_id, open_model
from mmpt.stream import Stream
from mmpt.vocab import Modality

MAX_IDS = 1 << 14  # of one pass, whose attention sees all of them


def inspect_file(
    file: Path, *, model: Path | None = None, out: Path | None = None, device: str = ""
) -> dict[str, Any]:
    """Write a page that shows the ids of FILE, a result of mmpt, as the model sees them.

    A ribbon of all ids, codes over what they decode to, the likelihood of every id, and the experts
    that saw it. --model, --device: as of replay. --out: the page (default: FILE.html).
    """
    recording = read_recording(file)
    pipeline = open_model(recording.provenance, model, device)
    content = [load_part(file)] if recording.content is None else recording.content
    look = look_at(recording, pipeline, content, str(file))
    routes = look.routes
    page = file.with_name(f"{file.name}.html") if out is None else out
    write_atomic(page, render(look, pipeline.processor, file.name))
    kinds = {kind: look.kinds.count(kind) for kind in dict.fromkeys(look.kinds)}
    nats = {
        kind: round(float(routes.nats[1:][np.array(look.kinds[1:]) == kind].mean()), 4)
        for kind in dict.fromkeys(look.kinds[1:])
    }
    return {"page": str(page), "ids": kinds, "nats_each": nats}


def look_at(recording: Recording, pipeline: Pipeline, content: Sequence[Part], name: str) -> Look:
    """What the page of a recording shows, in one pass of the model that made it.

    content: the parts that were made. Raises UserError for ids that cannot be shown.
    """
    record, processor = recording.provenance, pipeline.processor
    if not 0 < len(record.ids) <= MAX_IDS:
        raise UserError(
            f"{name} holds {len(record.ids):,} ids; a page shows 1 to {MAX_IDS:,}; a picture may "
            "have had no room for them: give the .json of the result"
        )
    ids = np.array(record.ids, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= len(processor.vocabulary):
        raise UserError(f"{name} holds ids that vocabulary {record.vocabulary} has not")
    stream = read_stream(ids, processor.vocabulary)
    return Look(
        stream,
        measure(pipeline.model, stream, processor.vocabulary),
        kinds_of(stream, processor),
        [_name(int(token), processor) for token in ids],
        content,
        _about(recording),
    )


def kinds_of(stream: Stream, processor: Processor) -> list[str]:
    """Of each id: its medium, or structure."""
    names = [Modality(int(number)).name.lower() for number in stream.modality]
    is_text = (stream.ids < processor.vocabulary.num_text).tolist()
    pairs = zip(names, is_text, strict=True)
    return ["structure" if name == "text" and not text else name for name, text in pairs]


def _name(token: int, processor: Processor) -> str:
    if token < processor.vocabulary.num_text:
        return processor.text.decode(torch.tensor([[token]]))
    return name_id(token, processor.vocabulary)


def _about(recording: Recording) -> dict[str, Any]:
    record: Provenance = recording.provenance
    about: dict[str, Any] = {
        "model": record.model,
        "vocabulary": record.vocabulary,
        "place in its batch": f"{record.place[0] + 1} of {record.place[1]}",
        "circumstances": asdict(record.circumstances),
    }
    if recording.request is not None:
        about["seed"] = recording.request.seed
        given = [item for item in recording.request.items if isinstance(item, Text)]
        about["texts given"] = [each.text for each in given]
        for number, slot in enumerate(recording.request.slots, 1):
            about[f"slot {number}: {slot.medium or 'what the model decides'}"] = dict(slot.settings)
    return about
