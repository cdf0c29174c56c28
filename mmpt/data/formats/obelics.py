"""OBELICS: parquet rows of a page, `images[i]` (a URL) or `texts[i]` in reading order."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, LeftOut
from mmpt.data.formats.files import each, read_downloaded, walk

COLUMNS = ("images", "texts", "general_metadata")
ROWS = 16  # that are read at once


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Documents of a parquet file or of a folder of them; pictures are looked up in `images`."""
    assert images is not None
    yield from each(walk(path, (".parquet",)), lambda file: _read_file(file, images))


def _read_file(file: Path, images: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    first = 0
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
            have = set(table.schema_arrow.names)
            if not {"images", "texts"} <= have:
                raise UserError(f"bad parquet: needs columns images and texts, has {sorted(have)}")
            for group in range(table.num_row_groups):
                yield from _read_group(table, group, str(file), first, images)
                first += table.metadata.row_group(group).num_rows
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"bad parquet: {_first_line(error)}") from None


def _read_group(table: Any, group: int, path: str, first: int, images: Path) -> Iterator[Item]:
    """The rows of a group; when it is damaged, the next group is read."""
    import pyarrow

    number = first
    columns = [name for name in COLUMNS if name in table.schema_arrow.names]
    try:
        for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns):
            for row in batch.to_pylist():
                yield _document(row, path, number, images)
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        last = first + table.metadata.row_group(group).num_rows - 1
        why = f"bad parquet: rows {number} to {last}: {_first_line(error)}"
        yield LeftOut(path, number, Path(path).stem, why)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _document(row: dict[str, Any], path: str, number: int, images: Path) -> Item:
    base = _url(row) or f"{Path(path).stem}/{number}"
    draft = Draft(path, number, base)
    try:
        for link, text in zip(*_columns(row), strict=True):
            if text is not None:
                draft.text(text)
            elif link is not None:
                draft.add("image", link, lambda link=link: read_downloaded(link, images))
    except UserError as error:
        return LeftOut(path, number, base, str(error))
    return draft


def _columns(row: dict[str, Any]) -> tuple[list[str | None], list[str | None]]:
    links, texts = row["images"], row["texts"]
    if not isinstance(links, list) or not isinstance(texts, list) or len(links) != len(texts):
        raise UserError("bad row: images and texts must be lists of equal length")
    for number, (link, text) in enumerate(zip(links, texts, strict=True)):
        if not all(value is None or isinstance(value, str) for value in (link, text)):
            raise UserError(f"bad row: entry {number} is no string")
        if link is not None and text is not None:
            raise UserError(f"bad row: entry {number} is a picture and a text")
    return links, texts


def _url(row: dict[str, Any]) -> str:
    """Of the page; it stands in the general metadata."""
    try:
        described = json.loads(row.get("general_metadata") or "{}")
    except (ValueError, TypeError, RecursionError):
        return ""
    url = described.get("url") if isinstance(described, dict) else ""
    return url if isinstance(url, str) else ""
