"""How a result was made, kept in the files that hold it, so that it can be made again.

A record has the request with all that was given, fingerprints of the model and its codecs, the
circumstances that decide about the last bit, and hashes of the ids and of what they decode to. The
ids stand in it, too, but nothing is ever generated from them: they name the first that differs.

A record is JSON: the metadata of PNG, WebP, WAV and MP4 files, or a file that also holds the parts.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import mmpt
from mmpt.config import UserError, from_dict, write_atomic
from mmpt.content import part_from_json, part_to_json
from mmpt.media import Source, bytes_of, open_film, open_picture
from mmpt.metadata import MAX_NOTE, find_chunk, picture_note
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.request import Request
from mmpt.results import Result
from mmpt.vocab import Modality

if TYPE_CHECKING:
    from mmpt.pipeline import Pipeline

FORMAT_VERSION = 1
MAX_BYTES = 1 << 28  # of a file that is read
SUFFIX = {Text: ".txt", Image: ".png", Video: ".mp4", Audio: ".wav"}
WHOLE = "result.json"


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What may change the last bit of a sum, and so an id. threads: of PyTorch on the CPU."""

    mmpt: str
    torch: str
    device: str
    processor: str
    threads: int
    dtype: str
    max_side: int
    codecs: dict[str, str]  # fingerprints

    @classmethod
    def now(cls, pipeline: "Pipeline") -> "Circumstances":
        """Those of this process."""
        weight = pipeline.model.embedding
        on_cpu = weight.device.type == "cpu"
        processor = pipeline.processor
        known = processor.vocabulary
        codecs = {m.name.lower(): known.fingerprint_of(m) for m in Modality if known.has(m)}
        capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return cls(
            mmpt=mmpt.__version__,
            torch=torch.__version__,
            device=weight.device.type,
            processor=capability if on_cpu else torch.cuda.get_device_name(weight.device),
            threads=torch.get_num_threads(),
            dtype=str(weight.dtype).removeprefix("torch."),
            max_side=processor.max_side,
            codecs=codecs,
        )


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """sha256 of what a part is, to the last bit."""

    type: str
    sha256: str

    @classmethod
    def of(cls, part: Part) -> "PartRecord":
        """Of a part of any kind; decoded arrays, not of what a file made of them."""
        kind = type(part).__name__.lower()
        if isinstance(part, Text):
            return cls(type=kind, sha256=hashlib.sha256(part.text.encode()).hexdigest())
        if isinstance(part, Image):
            array, rate = part.pixels, 0.0
        elif isinstance(part, Video):
            array, rate = part.frames, part.fps
        else:
            array, rate = part.wave, float(part.sample_rate)
        digest = hashlib.sha256(f"{array.dtype.str} {array.shape} {rate}".encode())
        digest.update(array.tobytes())
        return cls(type=kind, sha256=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """A record but for its request. ids are empty where a media file had no room for them.

    place: which of how many that were answered together. part: which of the parts the file is.
    """

    model: str
    vocabulary: str
    circumstances: Circumstances
    place: tuple[int, int]
    ids_sha256: str
    ids: tuple[int, ...]
    parts: tuple[PartRecord, ...]
    part: int | None = None


class Recording(NamedTuple):
    """What a file says: request is None where there was no room, content where it is no JSON."""

    provenance: Provenance
    request: Request | None
    content: list[Part] | None


def stamp(result: Result, pipeline: "Pipeline") -> Result:
    """The same result, whose parts know how they were made; they say so once they are saved."""
    known = replace(result, circumstances=Circumstances.now(pipeline))
    parts = [
        replace(part, provenance=partial(_note, known, index))
        for index, part in enumerate(result.parts)
    ]
    return replace(known, parts=parts)


def save_result(result: Result, path: str | Path) -> list[Path]:
    """`Result.save`."""
    path = Path(path)
    if path.suffix == ".json":
        write_atomic(path, _whole(result))
        return [path]
    if path.suffix:
        if len(result.parts) != 1:
            raise UserError(
                f"{path} holds one part, the result has {len(result.parts)}; give .json or a folder"
            )
        result.parts[0].save(path)
        return [path]
    paths = [path / f"{n}{SUFFIX[type(part)]}" for n, part in enumerate(result.parts, 1)]
    for part, place in zip(result.parts, paths, strict=True):
        part.save(place)
    return [*paths, *save_result(result, path / WHOLE)]


def read_recording(path: str | Path) -> Recording:
    """The record of a file. Raises UserError in one line for a file without, or a changed one.

    Nothing that it says is acted upon here, and nothing larger than the file says is allocated.
    """
    data = _load(Path(path))
    version = data.pop("mmpt", None)
    if type(version) is not int or version < 1:
        raise UserError(f"{path} holds no result of mmpt")
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format {version}; this mmpt reads {FORMAT_VERSION}: upgrade")
    content, said = data.pop("content", None), data.pop("sha256", None)
    if said != _digest(data):
        raise UserError(f"the provenance in {path} was changed after it was written")
    request = data.pop("request", None)
    try:
        record = from_dict(Provenance, data, where=f"the provenance in {path}")
        asked = None if request is None else Request.from_json(request)
        parts = None if content is None else [part_from_json(each) for each in content]
        index, size = record.place
        if not 0 <= index < size or (record.part or 0) not in range(len(record.parts) or 1):
            raise UserError(f"the provenance in {path} counts to {size}, but names {index}")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} holds no result that can be read: {error!r}") from None
    if parts is not None and tuple(map(PartRecord.of, parts)) != record.parts:
        raise UserError(f"the parts in {path} were changed after it was written")
    return Recording(record, asked, parts)


def read_note(source: Source) -> str | None:
    """The metadata of a media file; None where there is none. UserError for a broken file."""
    data = bytes_of(source)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return find_chunk(data)
    if data[4:8] == b"ftyp":
        with open_film(source) as film:
            return film.metadata.get("comment")
    if data[:8] == b"\x89PNG\r\n\x1a\n" or data[:4] == b"RIFF":
        with open_picture(source) as picture:
            return picture_note(picture)
    return None


def hash_ids(ids: np.ndarray) -> str:
    """sha256 of ids int64 (n,)."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def _record(result: Result) -> dict[str, Any]:
    if result.circumstances is None:
        raise UserError("this result does not know how it was made; it comes from no pipeline")
    return {
        "mmpt": FORMAT_VERSION,
        "request": result.request.to_json(),
        "model": result.model,
        "vocabulary": result.vocabulary,
        "circumstances": asdict(result.circumstances),
        "place": list(result.place),
        "ids_sha256": hash_ids(result.ids),
        "ids": result.ids.tolist(),
        "parts": [asdict(PartRecord.of(part)) for part in result.parts],
    }


def _note(result: Result, index: int) -> str:
    # what a file has no room for is left out: first the ids, then what was given
    record = _record(result) | {"part": index}
    for left_out in ({}, {"ids": []}, {"ids": [], "request": None}):
        note = _signed(record | left_out)
        if len(note) <= MAX_NOTE:
            break
    return note


def _whole(result: Result) -> str:
    text = _signed(_record(result))
    content = json.dumps([part_to_json(part) for part in result.parts])
    return f'{text[:-1]}, "content": {content}}}\n'


def _signed(record: dict[str, Any]) -> str:
    unsigned = {key: value for key, value in record.items() if key != "mmpt"}
    return json.dumps(record | {"sha256": _digest(unsigned)})


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}: {reason}") from None
    if size > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a result has at most {MAX_BYTES:,}")
    text = bytes_of(path) if path.suffix == ".json" else read_note(path)
    if text is None:
        raise UserError(
            f"{path} does not say how it was made; PNG, WebP, WAV, MP4 and JSON of results do"
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path} holds no result of mmpt, or a broken one") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no result of mmpt")
    return data
