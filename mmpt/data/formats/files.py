"""Files of an import: found in a fixed order, read in bounds, and never outside of their folder."""

import base64
import binascii
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mmpt.config import UserError
from mmpt.data.formats.draft import MAX_DOCUMENT_BYTES, Item, LeftOut

PICTURE_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")


def walk(path: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    """A file that is named, or those of a folder that have one of the suffixes, sorted."""
    if path.is_file():
        yield path
        return
    for folder, inner, names in os.walk(path):
        inner.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in suffixes:
                yield Path(folder, name)


def each(files: Iterable[Path], read: Callable[[Path], Iterator[Item]]) -> Iterator[Item]:
    """What `read` makes of the files; a file that it refuses is left out, and the next is read."""
    for file in files:
        try:
            yield from read(file)
        except UserError as error:
            yield LeftOut(str(file), 0, file.stem, str(error))


def root_of(path: Path) -> Path:
    """The folder that nothing may lead out of: the one that is named, or the one of a file."""
    return path if path.is_dir() else path.parent


def base_of(file: Path, root: Path) -> str:
    """What a file is about: its path from the named folder on, without the suffix."""
    return (root.resolve().name / file.relative_to(root).with_suffix("")).as_posix()


def read_inside(root: Path, file: Path, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a file under `root`; links that lead out of it and what is too large: no."""
    try:
        real = file.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise UserError(f"outside: {file} leads out of {root}; name a folder above")
        if not real.is_file():
            raise UserError(f"missing file: {file} is no plain file")
        if real.stat().st_size > limit:
            raise UserError(f"too large: {file} has more than {limit >> 20} MiB")
        return real.read_bytes()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise UserError(f"missing file: {file}: {getattr(error, 'strerror', error)}") from None


def read_linked(link: str, page: Path, root: Path) -> bytes:
    """The local file that a page names: beside the page or elsewhere under `root`, or inline."""
    shown = link[:200]
    try:
        url = urlsplit(link.strip())
    except ValueError:
        raise UserError(f"missing file: {shown!r} is no link") from None
    if url.scheme == "data":
        return _inline(url.path)
    if url.scheme or url.netloc:
        raise UserError(f"remote: {shown!r} is not in the folder")
    name = unquote(url.path)
    if not name or "\0" in name:
        raise UserError(f"missing file: {shown!r} names none")
    if name.startswith(("/", "\\")):
        raise UserError(f"outside: {shown!r} is an absolute path")
    return read_inside(root, page.parent / name)


def read_downloaded(url: str, images: Path, name: str = "") -> bytes:
    """A picture that was fetched from `url` into the folder `images`.

    Looked for under `name`, then under the SHA-256 of the URL (hex, with or without a suffix), then
    under the last component of the URL's path, which other URLs may share.
    """
    digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()
    last = url.partition("?")[0].partition("#")[0].rpartition("/")[2]
    for choice in (name, *(digest + suffix for suffix in PICTURE_SUFFIXES), last):
        plain = choice not in ("", ".", "..") and not set(choice) & set("/\\\0")
        if plain and os.path.isfile(images / choice):
            return read_inside(images, images / choice)
    raise UserError(f"missing picture: no file in {images} for {url[:200]!r}")


def _inline(described: str) -> bytes:
    """RFC 2397: `type;base64,...` or `type,percent-encoded`."""
    head, comma, data = described.partition(",")
    if not comma:
        raise UserError("missing file: a data: link without data")
    if not head.endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode(unquote_to_bytes(data))
    except binascii.Error as error:
        raise UserError(f"missing file: a data: link is no base64: {error}") from None
