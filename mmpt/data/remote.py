"""Where raw shards are: paths, folders, patterns, and URLs of any store that fsspec knows.

A remote shard is copied into a cache when it is read: whole, checked by its size, with a bounded
number of tries. A copy is kept as long as the store says that the shard is the same.
"""

import glob
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmpt.config import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
TRIES, PAUSE = 4, 1.0  # of one copy; seconds before the second, doubled before each other one
STALL = 60.0  # seconds without an answer or any byte, after which a try has failed
CHUNK = 1 << 20


def find_shards(patterns: Sequence[str]) -> list[str]:
    """The shards that paths, folders, globs, brace patterns (`{00..31}`) and URLs name, in order.

    Folders and globs give tar files sorted by name; token shards are no raw shards and left out.
    Raises UserError for a pattern that matches nothing.
    """
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            # an existing file may have braces in its name
            expanded = [pattern] if Path(pattern).is_file() else list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"unbalanced braces in {pattern!r}; write {{000..031}}") from None
        for each in expanded:
            shards = list(_remote(each) if is_remote(each) else _local(each))
            if not shards:
                raise UserError(f"no shard at {each}; give paths, folders or URLs of .tar files")
            found.update(dict.fromkeys(shards))
    if not found:
        raise UserError("no shards given; name one or more .tar files")
    return list(found)


def is_remote(shard: str | Path) -> bool:
    """Whether a shard is named by a URL."""
    return "://" in str(shard)


def version_of(shard: str) -> str:
    """What changes when a shard changes: the SHA-256 of a file, the store's own mark of a URL."""
    if is_remote(shard):
        return str(_patiently(shard, lambda fs, path: _soon(lambda: fs.ukey(path))))
    try:
        with Path(shard).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror}") from None


def local_copy(shard: str | Path) -> Path:
    """The path of a shard on this machine; a remote one is fetched unless the cache has it."""
    if not is_remote(shard):
        return Path(shard)
    url = str(shard)
    version = hashlib.sha256(f"{url} {version_of(url)}".encode()).hexdigest()[:16]
    path = cache_folder() / f"{version}-{url.rstrip('/').rpartition('/')[2]}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _patiently(url, lambda fs, remote: _fetch(fs, remote, path))
    return path


def cache_folder() -> Path:
    """Where copies of remote shards are kept: $MMPT_CACHE, or mmpt/shards in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MMPT_CACHE") or home / "mmpt" / "shards")


def _local(pattern: str) -> Iterator[str]:
    if Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern)}/*.tar"
    elif Path(pattern).is_file():
        yield pattern
        return
    yield from (path for path in sorted(glob.glob(pattern)) if not path.endswith(".tokens.tar"))


def _remote(url: str) -> Iterator[str]:
    if not any(mark in url.rpartition("://")[2] for mark in "*?["):
        yield url
        return

    def matching(fs: Any, path: str) -> list[str]:
        return [fs.unstrip_protocol(each) for each in _soon(lambda: fs.glob(path))]

    found = _patiently(url, matching)
    yield from sorted(each for each in found if not each.endswith(".tokens.tar"))


def _fetch(fs: Any, remote: str, path: Path) -> None:
    """Copy a remote file; a copy that is cut short is no copy."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    wanted, have = _soon(lambda: fs.size(remote)), 0
    try:
        with _soon(lambda: fs.open(remote, "rb")) as source, temporary.open("wb") as copy:
            while data := _soon(lambda: source.read(CHUNK)):
                _write(copy, data, path)
                have += len(data)
        if wanted is not None and have != wanted:
            raise OSError(f"{have} of {wanted} bytes came")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(copy: Any, data: bytes, path: Path) -> None:
    try:
        copy.write(data)
    except OSError as error:  # a full disk is not the store's fault: no other try helps
        raise UserError(f"cannot write {path}: {error.strerror}; free space there") from None


def _patiently(url: str, do: Callable[[Any, str], T]) -> T:
    """Do something with a URL's file system and path, again when it fails, but not for ever."""
    import fsspec

    try:
        fs, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}") from None
    for count in range(1, TRIES + 1):
        try:
            return do(fs, path)
        except FileNotFoundError:
            raise UserError(f"there is nothing at {url}") from None
        except PermissionError as error:
            raise UserError(f"no access to {url}: {error}") from None
        except UserError:
            raise
        except Exception as error:  # stores raise errors of many libraries
            if count == TRIES:
                raise UserError(f"cannot read {url} after {TRIES} tries: {error!r}") from None
            log.warning("%s: %r; another try follows", url, error)
            time.sleep(PAUSE * 2 ** (count - 1))
    raise AssertionError


def _soon(do: Callable[[], T]) -> T:
    """The result, or TimeoutError after STALL seconds; a stalled thread is left behind."""
    result: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(do())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STALL)
    if failed:
        raise failed[0]
    if not result:
        raise TimeoutError(f"no answer in {STALL:g} s")
    return result[0]
