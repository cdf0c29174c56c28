"""MINT-1T (PDF and ArXiv): tars of a JSON with `images[i]` or `texts[i]`, and a TIFF of pages."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, LeftOut
from mmpt.data.formats.files import each, walk
from mmpt.data.tars import Damage, Sample, read_samples
from mmpt.media import BROKEN, MAX_PIXELS


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Documents of a tar or of a folder of them: picture number n is page number n of the TIFF."""
    yield from each(walk(path, (".tar",)), _read_file)


def _read_file(file: Path) -> Iterator[Item]:
    for item in read_samples(file):
        if isinstance(item, Damage):
            yield LeftOut(item.shard, item.offset, item.key, item.why)
            continue
        try:
            yield _document(item)
        except UserError as error:
            yield LeftOut(item.shard, item.offset, item.key, str(error))


def _document(sample: Sample) -> Draft:
    names, texts = _columns(sample)
    draft = Draft(sample.shard, sample.offset, f"{Path(sample.shard).stem}/{sample.key}")
    pages = _Pages(sample, sum(name is not None for name in names))
    for name, text in zip(names, texts, strict=True):
        if text is not None:
            draft.text(text)
        elif name is not None:
            draft.add("image", name, pages.next)
    return draft


def _columns(sample: Sample) -> tuple[list[str | None], list[str | None]]:
    try:
        row: Any = json.loads(sample.members.get("json", b"null"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"bad json: {error}") from None
    if not isinstance(row, dict):
        raise UserError("bad sample: it has no json with images and texts")
    names, texts = row.get("images"), row.get("texts")
    if not isinstance(names, list) or not isinstance(texts, list) or len(names) != len(texts):
        raise UserError("bad sample: images and texts must be lists of equal length")
    for number, pair in enumerate(zip(names, texts, strict=True)):
        if not all(value is None or isinstance(value, str) for value in pair) or None not in pair:
            raise UserError(f"bad sample: entry {number} must be a picture or a text")
    return names, texts


class _Pages:
    """The pages of the TIFF one after another; a page that is broken does not hide the next."""

    def __init__(self, sample: Sample, num_pages: int) -> None:
        self._number = 0
        if not num_pages:
            return
        data = next((sample.members[n] for n in ("tiff", "tif") if n in sample.members), None)
        if data is None:
            raise UserError(f"missing part: {num_pages} pictures, and no tiff beside the json")
        try:
            self._file = PIL.Image.open(io.BytesIO(data), formats=("TIFF",))
            have = getattr(self._file, "n_frames", 1)
        except (*BROKEN, PIL.Image.DecompressionBombError) as error:
            raise UserError(f"bad tiff: {error}") from None
        if have != num_pages:  # which page is which picture cannot be told
            raise UserError(f"bad tiff: {have} pages for {num_pages} pictures")

    def next(self) -> bytes:
        """The next page as a TIFF of its own."""
        self._number += 1
        try:
            self._file.seek(self._number - 1)
            width, height = self._file.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{width} x {height} pixels are too many")
            buffer = io.BytesIO()
            self._file.copy().save(buffer, "tiff")
        except (*BROKEN, PIL.Image.DecompressionBombError) as error:
            raise UserError(f"bad tiff: page {self._number}: {error}") from None
        return buffer.getvalue()
