"""`mmpt replay`: make a result again, and say whether it is the same to the last bit.

Its own ids are not used: the request that is kept in its file is answered anew. Under the recorded
circumstances every id and every decoded array is equal; otherwise the first id that differs is
named, and which circumstances are others now.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.model.weights import fingerprint
from mmpt.parts import Part, Text, Video, load_part
from mmpt.pipeline import Pipeline
from mmpt.provenance import (
    Circumstances,
    PartRecord,
    Provenance,
    Recording,
    hash_ids,
    read_recording,
)
from mmpt.results import Result
from mmpt.vocab import Vocabulary

PLACES = ("runs/*", "runs/*/model", "models/*", "examples/*")  # of models, from here
LOSSLESS = (".png", ".wav")
# of a request that a file holds: far above what people ask for, far below what harms
MOST = {"height": 4096, "width": 4096, "frames": 4096, "max_ids": 1 << 16, "max_seconds": 600}
MOST |= {"num_passes": 4096}
MAX_BATCH = 64


def replay(
    file: str | Path, *, model: str | Path | None = None, device: str = ""
) -> dict[str, Any]:
    """Generate FILE again from the request in its metadata; FILE is a result of mmpt.

    --model: a model folder or a run; without it, the one of the recorded fingerprint in runs/,
    models/ or examples/. --device: the recorded one where it is there. Exit status: 0 equal to the
    last bit, 1 something differs, 2 it cannot be replayed.
    """
    file, model = Path(file), None if model is None else Path(model)
    recording = read_recording(file)
    pipeline = open_model(recording.provenance, model, device)
    with _threads(recording.provenance.circumstances.threads):
        result = repeat(recording, pipeline, str(file))
        now = Circumstances.now(pipeline)
    return {"file": str(file)} | compare(recording.provenance, result, now, pipeline, file)


def open_model(record: Provenance, model: Path | None, device: str = "") -> Pipeline:
    """The model that a record names by its fingerprint. Raises UserError for any other."""
    folder = _find_model(record.model) if model is None else model
    on_gpu = record.circumstances.device == "cuda" and torch.cuda.is_available()
    pipeline = Pipeline.load(folder, device=device or ("cuda" if on_gpu else "cpu"))
    if pipeline.fingerprint != record.model:
        raise UserError(
            f"{folder} is model {pipeline.fingerprint}, the file was made by {record.model}; give "
            "that one with --model"
        )
    pipeline.processor.vocabulary.check(record.vocabulary, what="the file")
    return pipeline


def repeat(recording: Recording, pipeline: Pipeline, name: str) -> Result:
    """The answer to the recorded request, in a batch of the recorded size.

    The other requests of that batch are not recorded: this one stands in for them.
    """
    if recording.request is None:
        raise UserError(
            f"{name} had no room for what its request was given; replay the .json of the result"
        )
    place, size = recording.provenance.place
    if size > MAX_BATCH:
        raise UserError(f"{name} says it was made in a batch of {size}; at most {MAX_BATCH}")
    for slot in recording.request.slots:
        for key, most in MOST.items():
            if (value := getattr(slot.chosen, key)) > most:
                raise UserError(f"{name} asks for {key} = {value}; a replay makes at most {most}")
    return pipeline.answer([recording.request] * size)[place]


def compare(
    record: Provenance, result: Result, now: Circumstances, pipeline: Pipeline, file: Path
) -> dict[str, Any]:
    """What the command says: the first difference, and what else is different now."""
    out: dict[str, Any] = {"ids": len(result.ids), "parts": len(result.parts)}
    same_ids = hash_ids(result.ids) == record.ids_sha256
    parts = tuple(map(PartRecord.of, result.parts))
    changed = {
        key: f"{was}, now {value}"
        for key, was in vars(record.circumstances).items()
        if (value := getattr(now, key)) != was
    }
    kept = record.part is None or _is_kept(file, result.parts[record.part : record.part + 1])
    if same_ids and parts == record.parts and kept:
        out["replayed"] = "equal to the last bit"
        return out | ({"circumstances": changed} if changed else {})
    out["replayed"] = "differs"
    if not same_ids:
        out["first_difference"] = _first(record.ids, result.ids, pipeline.processor.vocabulary)
    elif parts != record.parts:
        pairs = enumerate(zip(parts, record.parts, strict=False), 1)
        numbers = [str(n) for n, (is_, was) in pairs if is_ != was]
        out["decoded"] = f"ids are equal, but part {', '.join(numbers)} decodes to other values"
    elif not kept:
        out["content"] = "the file no longer shows what was made; its ids and arrays are equal"
    out["circumstances"] = changed or "the same, as far as they are recorded"
    if record.place[1] > 1:
        out["batch"] = f"made in a batch of {record.place[1]}; the other requests are not recorded"
    return out | {"exit_status": 1}


def _first(was: tuple[int, ...], ids: np.ndarray, vocabulary: Vocabulary) -> dict[str, Any] | str:
    if not was:
        return "some id; the file had no room for them"
    common = min(len(was), len(ids))
    differ = np.flatnonzero(np.array(was[:common]) != ids[:common])
    place = int(differ[0]) if len(differ) else common
    sides = [list(was), ids.tolist()]
    old, new = (name_id(s[place], vocabulary) if place < len(s) else "the end" for s in sides)
    return {"position": place, "was": old, "is": new}


def name_id(token: int, vocabulary: Vocabulary) -> str:
    """An id in words."""
    if 0 <= token < vocabulary.num_text:
        return f"{token} (text)"
    if 0 <= token - vocabulary.num_text < len(vocabulary.structure):
        return f"{token} ({vocabulary.structure[token - vocabulary.num_text]})"
    if size := vocabulary.size_of(token):
        return f"{token} (size {size})"
    for book in vocabulary.ranges:
        if book.start <= token < book.stop:
            return f"{token} ({book.name} code {token - book.start})"
    return f"{token} (unknown)"


def _is_kept(file: Path, parts: list[Part]) -> bool:
    """Whether a file without loss still holds the part that it was written from."""
    if not parts or isinstance(parts[0], Text | Video) or file.suffix.lower() not in LOSSLESS:
        return True
    written = type(parts[0]).load(parts[0].encode(file.suffix.lower()))
    return PartRecord.of(load_part(file)) == PartRecord.of(written)


def _find_model(wanted: str) -> Path:
    for pattern in PLACES:
        for folder in sorted(Path().glob(pattern)):
            if (folder / "config.json").is_file() and fingerprint(folder) == wanted:
                return folder
    raise UserError(
        f"no model {wanted} in {', '.join(PLACES)}; say with --model where the one is that made it"
    )


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    """As many threads as were used, where this machine has so many cores."""
    before = torch.get_num_threads()
    if 1 <= wanted <= (os.cpu_count() or 1):
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
