"""Raw shards: webdataset tars, read in full even where they are damaged, and never in silence.

A sample is a run of members with one key (the name up to the first dot of its last component).
`KEY.json` lists the parts of a document in order; the other members hold its media. Plain paired
samples (`KEY.png` beside `KEY.txt`) are documents too. Everything that cannot be used is either a
`Damage` of the tar or a sample that goes to the `Quarantine`; both say where and why.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmpt.config import UserError
from mmpt.data.entries import load_roles, load_times
from mmpt.data.indexed import samples_of
from mmpt.data.quarantine import Quarantine
from mmpt.data.tars import Damage, Sample, read_samples
from mmpt.media import MAX_FPS, video_bytes
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.sound import sound_bytes

__all__ = [
    "Damage",
    "Document",
    "Quarantine",
    "Record",
    "Sample",
    "is_heldout",
    "read_documents",
    "read_samples",
    "write_shard",
]

Order = Literal["any", "fixed"]
MEDIA_TYPES = {"image": Image, "video": Video, "audio": Audio}
PLAIN_TEXT = ("txt", "cls", "json")
PLAIN_MEDIA = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), "image"),
    **dict.fromkeys(("wav", "flac", "ogg", "opus", "mp3"), "audio"),
    **dict.fromkeys(("mp4", "webm"), "video"),
}


def is_heldout(base: str) -> bool:
    """Whether documents of this base key are kept from all training: about one idea in ten."""
    return int.from_bytes(hashlib.sha256(base.encode()).digest()[:8], "big") % 10 == 0


@dataclass(frozen=True)
class Document:
    """Decoded parts; "any" order: views of one idea that may be permuted; "fixed": a page.

    voices: who speaks in each audio part, "" where the shard does not say; empty: no word of it.
    mirror: whether its pictures and clips mean the same when left and right are swapped.
    times: when each part begins and ends, in seconds of the document, None where the shard does
    not say; empty: no word of it.
    roles: of a conversation, who says each part, "user" or "assistant"; equal neighbours are one
    turn.
    """

    key: str
    base: str
    order: Order
    parts: list[Part]
    source: str = ""
    shard: str = ""
    voices: tuple[str, ...] = ()
    mirror: bool = True
    times: tuple[tuple[float, float] | None, ...] = ()
    roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """A document whose media are encoded already: what `write_shard` writes byte for byte.

    A text part is `{"type": "text", "text": ...}`; a media part holds its bytes under "data" and
    its format under "suffix"; all other keys (role, fps, voice, synthetic, start, end) go to the
    json as they are, and so does `more`, beside the list of parts.
    """

    key: str
    base: str
    order: Order
    parts: tuple[dict[str, Any], ...]
    source: str
    license: str
    mirror: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)


def read_documents(paths: Iterable[str | Path], quarantine: Quarantine) -> Iterator[Document]:
    """Every usable document of the shards in order; the rest goes to `quarantine`."""
    return (document for _, document in read_usable(paths, quarantine))


def read_usable(
    paths: Iterable[str | Path], quarantine: Quarantine
) -> Iterator[tuple[Sample, Document]]:
    """`read_documents`, each with the sample that it was read from."""
    for path in paths:
        for item in samples_of(path):
            where = {"shard": item.shard, "offset": item.offset, "key": item.key}
            if isinstance(item, Damage):
                quarantine.add(**where, why=item.why)
                continue
            try:
                yield item, load_document(item)
            except UserError as error:
                quarantine.add(**where, why=str(error))


def load_document(sample: Sample) -> Document:
    """Decode one sample; raises UserError that says what is missing or broken."""
    if "json" in sample.members:
        described = _parse_json(sample.members["json"])
        if isinstance(described, dict) and "parts" in described:
            return _load_described(sample, described)
    return _load_paired(sample)


def write_shard(path: str | Path, documents: Iterable[Record | Document]) -> int:
    """Write a tar atomically; equal documents give equal bytes. Returns how many were written."""
    records = (each if isinstance(each, Record) else encode_document(each) for each in documents)
    return write_samples(path, map(_to_sample, records))


def write_samples(path: str | Path, samples: Iterable[dict[str, Any]]) -> int:
    """`write_shard` of samples in webdataset's form: "__key__" and the bytes of each member."""
    from webdataset.writer import TarWriter

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with (
            open(temporary, "wb") as file,
            TarWriter(
                file, encoder=False, mtime=0, user="mmpt", group="mmpt", mode=0o644
            ) as writer,
        ):
            for sample in samples:
                writer.write(sample)
                count += 1
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count


def encode_document(document: Document) -> Record:
    """Encode decoded parts without loss: WebP for pictures and clips, FLAC for sound."""
    return Record(
        key=document.key,
        base=document.base,
        order=document.order,
        parts=tuple(_encode_parts(document)),
        source=document.source,
        license="",
        mirror=document.mirror,
    )


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"bad json: {error}") from None


def _load_described(sample: Sample, described: dict[str, Any]) -> Document:
    parts = described["parts"]
    if not isinstance(parts, list) or not parts:
        raise UserError("bad json: parts must be a list that is not empty")
    order = described.get("order", "fixed")
    if order not in ("any", "fixed"):
        raise UserError(f"bad json: order is any or fixed, not {order!r}")
    return Document(
        key=sample.key,
        base=str(described.get("base", sample.key)),
        order=order,
        parts=[_load_part(sample, entry) for entry in parts],
        source=str(described.get("source", "")),
        shard=sample.shard,
        voices=tuple(str(entry.get("voice", "")) for entry in parts if entry["type"] == "audio"),
        mirror=described.get("mirror") is not False,
        times=load_times(parts),
        roles=load_roles(parts, order),
    )


def _load_part(sample: Sample, entry: Any) -> Part:
    if not isinstance(entry, dict):
        raise UserError(f"bad json: a part must be a table, not {type(entry).__name__}")
    kind = entry.get("type")
    if kind == "text":
        return _load_text(entry.get("text"))
    if kind not in MEDIA_TYPES:
        raise UserError(f"bad json: unknown part type {kind!r}; use text, image, video or audio")
    ref = entry.get("ref")
    if not isinstance(ref, str) or ref not in sample.members:
        raise UserError(f"missing part: the sample has no member {ref!r}")
    fps = entry.get("fps")
    if kind != "video" or fps is None:
        return _load_media(kind, ref, sample.members[ref])
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= MAX_FPS:
        raise UserError(f"bad json: fps must be a number above 0, not {fps!r}")
    return _load_media(kind, ref, sample.members[ref], fps=float(fps))


def _load_paired(sample: Sample) -> Document:
    """A plain paired sample: its texts, then its media, as views of one idea.

    A json table without a text, beside other members, only describes them.
    """
    if sample.beside_damage:
        raise UserError(
            "maybe incomplete: members of it were lost or stand elsewhere, and no part list says "
            "which it has"
        )
    parts: list[Part] = []
    for name in PLAIN_TEXT:
        if name in sample.members and not (len(sample.members) > 1 and _describes(sample, name)):
            parts.append(_load_plain_text(name, sample.members[name]))
    for name, data in sample.members.items():
        if name in PLAIN_MEDIA:
            parts.append(_load_media(PLAIN_MEDIA[name], name, data))
        elif name not in PLAIN_TEXT:
            raise UserError(f"unknown member: {name!r}, and no json lists it as a part")
    return Document(sample.key, sample.key, "any", parts, shard=sample.shard)


def _describes(sample: Sample, name: str) -> bool:
    if name != "json":
        return False
    described = _parse_json(sample.members[name])
    return isinstance(described, dict) and "text" not in described


def _load_plain_text(name: str, data: bytes) -> Text:
    if name == "json":
        described = _parse_json(data)
        text = described.get("text") if isinstance(described, dict) else described
        return _load_text(text)
    try:
        return _load_text(data.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"bad text: {name} is not UTF-8 at byte {error.start}") from None


def _load_text(text: Any) -> Text:
    if not isinstance(text, str):
        raise UserError(f"bad json: text must be a string, not {type(text).__name__}")
    if not text.strip():
        raise UserError("empty text: a text part needs at least one visible character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("bad text: it holds a lone surrogate, which is no UTF-8") from None
    return Text(text)


def _load_media(kind: str, name: str, data: bytes, **options: float) -> Part:
    try:
        return MEDIA_TYPES[kind].load(data, **options)
    except UserError as error:
        raise UserError(f"bad {kind}: {name}: {error}") from None


def _encode_parts(document: Document) -> Iterator[dict[str, Any]]:
    voices, times, roles = map(iter, (document.voices, document.times, document.roles))
    for part in document.parts:
        entry = _encode_part(part)
        voice = next(voices, "") if isinstance(part, Audio) else ""
        time = next(times, None)
        role = next(roles, "")
        entry |= {"start": time[0], "end": time[1]} if time else {}
        entry |= {"role": role} if role else {}
        yield entry | ({"voice": voice} if voice else {})


def _encode_part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Audio):
        data = sound_bytes(part.wave, part.sample_rate, ".flac")
        return {"type": "audio", "suffix": "flac", "data": data}
    if isinstance(part, Image):
        data = video_bytes(part.pixels[None], 1.0, ".webp")
        return {"type": "image", "suffix": "webp", "data": data}
    # an animation of equal frames would be one frame
    suffix = "webp" if (part.frames[1:] != part.frames[0]).any() else "tiff"
    data = video_bytes(part.frames, part.fps, f".{suffix}")
    return {"type": "video", "suffix": suffix, "fps": part.fps, "data": data}


def _to_sample(record: Record) -> dict[str, Any]:
    """The members of a record, json first, in webdataset's dict form."""
    if "." in record.key or record.key.startswith("/") or not record.key:
        raise UserError(f"key {record.key!r} needs a relative name without dots")
    entries, media = [], {}
    for number, part in enumerate(record.parts):
        entry = {key: value for key, value in part.items() if key not in ("data", "suffix")}
        if "data" in part:
            entry["ref"] = f"{number}.{part['suffix']}"
            media[entry["ref"]] = part["data"]
        entries.append(entry)
    described = {
        "base": record.base,
        "order": record.order,
        "parts": entries,
        "source": record.source,
        "license": record.license,
        **({} if record.mirror else {"mirror": False}),
        **record.more,
    }
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    return {"__key__": record.key, "json": text.encode(), **media}
