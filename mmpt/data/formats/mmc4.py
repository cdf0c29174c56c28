"""MMC4: lines of JSON, zipped or not: sentences, and pictures that are matched to one of them."""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, LeftOut
from mmpt.data.formats.files import each, read_downloaded, walk

MAX_LINE_BYTES = 1 << 26
BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Documents of .jsonl, .jsonl.gz and .zip files; each picture stands before its sentence.

    A picture is looked up in `images` by its image_name, then by its URL.
    """
    assert images is not None
    suffixes = (".jsonl", ".gz", ".zip")
    yield from each(walk(path, suffixes), lambda file: _read_file(file, images))


def _read_file(file: Path, images: Path) -> Iterator[Item]:
    number = 0
    try:
        for number, line in enumerate(_lines(file)):
            if line.strip():
                yield _document(line, str(file), number, images)
    except BROKEN as error:
        why = f"bad file: after line {number}: {error}"
        yield LeftOut(str(file), number, file.stem, why)


def _lines(file: Path) -> Iterator[bytes]:
    for stream in _streams(file):
        while line := stream.readline(MAX_LINE_BYTES):
            yield line
            # the rest of a line that is too long is read and dropped; what was cut is bad JSON
            while not line.endswith(b"\n") and (line := stream.readline(MAX_LINE_BYTES)):
                pass


def _streams(file: Path) -> Iterator[IO[bytes]]:
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():  # names only choose: nothing is extracted
                if member.filename.endswith((".jsonl", ".json")):
                    with archive.open(member) as stream:
                        yield stream
        return
    with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
        yield stream  # type: ignore[misc] # GzipFile reads bytes, too


def _document(line: bytes, path: str, number: int, images: Path) -> Item:
    base = f"{Path(path).stem}/{number}"
    try:
        row = _parse(line)
        if isinstance(url := row.get("url"), str) and url:
            base = url
        draft = Draft(path, number, base)
        before = _matches(row)
        for place, sentence in enumerate(row["text_list"]):
            for info in before.get(place, ()):
                link, name = info.get("raw_url") or "", info.get("image_name") or ""
                draft.add(
                    "image", name or link, lambda n=name, u=link: read_downloaded(u, images, n)
                )
            draft.text(sentence, joint=" ")
    except UserError as error:
        return LeftOut(path, number, base, str(error))
    return draft


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"bad json: {error}") from None
    texts = row.get("text_list") if isinstance(row, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError("bad row: text_list must be a list of strings")
    return row


def _matches(row: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The pictures by the sentence that they stand before."""
    infos, num_texts = row.get("image_info", []), len(row["text_list"])
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise UserError("bad row: image_info must be a list of tables")
    before: dict[int, list[dict[str, Any]]] = {}
    for info in infos:
        place = info.get("matched_text_index")
        if type(place) is not int or not 0 <= place < num_texts:
            raise UserError(f"bad row: matched_text_index {place!r} is none of {num_texts} texts")
        if not all(isinstance(info.get(key) or "", str) for key in ("raw_url", "image_name")):
            raise UserError("bad row: raw_url and image_name must be strings")
        before.setdefault(place, []).append(info)
    return before
