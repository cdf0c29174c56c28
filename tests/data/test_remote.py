"""Shards by path, pattern and URL; a store that fails, stalls or cuts short is asked again."""

import io
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmpt.config import UserError
from mmpt.data import remote
from mmpt.data.remote import find_shards, local_copy
from mmpt.data.verify import verify
from tests.data.test_shards import make_shard


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "STALL", 0.3)
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path / "cache"))
    Troubled.troubles = []
    MemoryFileSystem.store.clear()


class Troubled(MemoryFileSystem):
    """A store that fails in the ways of `troubles`, one at each opening, then works."""

    protocol = "troubled"
    troubles: ClassVar[list[str]] = []
    opened = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("troubled://", "memory://"))

    def _open(self, path, mode="rb", **options):
        type(self).opened += 1
        trouble = self.troubles.pop(0) if self.troubles else ""
        file = super()._open(path, mode, **options)
        if trouble == "fails":
            raise ConnectionError("reset by peer")
        if trouble == "stalls":
            time.sleep(1)
        return io.BytesIO(file.read()[:-100]) if trouble == "short" else file


fsspec.register_implementation("troubled", Troubled)


def stored(path: Path, name: str = "a.tar") -> str:
    """The URL of a copy of a file in the store."""
    MemoryFileSystem().pipe(f"/shards/{name}", path.read_bytes())
    return f"troubled://shards/{name}"


def test_folders_globs_braces_and_paths_name_shards_in_order(tmp_path: Path) -> None:
    for name in ("b-001.tar", "b-000.tar", "a.tar", "a.tokens.tar", "c{1}.tar", "note.txt"):
        (tmp_path / name).touch()
    names = [Path(shard).name for shard in find_shards([str(tmp_path)])]
    assert names == ["a.tar", "b-000.tar", "b-001.tar", "c{1}.tar"]
    patterns = [f"{tmp_path}/b-{{000..001}}.tar", f"{tmp_path}/*.tar", f"{tmp_path}/c{{1}}.tar"]
    names = [Path(shard).name for shard in find_shards(patterns)]
    assert names == ["b-000.tar", "b-001.tar", "a.tar", "c{1}.tar"]
    for pattern in ("b-{000..002}.tar", "x*.tar", "none"):
        with pytest.raises(UserError, match="no shard at"):
            find_shards([f"{tmp_path}/{pattern}"])
    with pytest.raises(UserError, match="unbalanced braces"):
        find_shards(["b-{000.tar"])


def test_a_remote_shard_is_fetched_once_and_again_when_it_changes(tmp_path: Path) -> None:
    first, second = make_shard(tmp_path / "1.tar"), make_shard(tmp_path / "2.tar", 2)
    url = stored(first)
    before = Troubled.opened
    copy = local_copy(url)
    assert local_copy(url) == copy
    assert Troubled.opened == before + 1
    assert copy.read_bytes() == first.read_bytes()
    assert verify([url])["documents"] == 4
    time.sleep(0.01)
    stored(second)
    assert local_copy(url).read_bytes() == second.read_bytes()
    stored(first, "b.tar")
    found = find_shards(["troubled://shards/*.tar"])
    assert [shard.rpartition("/")[2] for shard in found] == ["a.tar", "b.tar"]
    assert local_copy(found[1]).read_bytes() == first.read_bytes()


@pytest.mark.parametrize("trouble", ["fails", "stalls", "short"])
def test_a_store_in_trouble_is_asked_again_but_not_for_ever(tmp_path: Path, trouble: str) -> None:
    path = make_shard(tmp_path / "1.tar")
    url = stored(path)
    Troubled.troubles = [trouble] * 2
    assert local_copy(url).read_bytes() == path.read_bytes()
    url = stored(path, "b.tar")
    Troubled.troubles = [trouble] * remote.TRIES
    with pytest.raises(UserError, match=f"cannot read {url} after {remote.TRIES} tries"):
        local_copy(url)
    assert [each.name[-5:] for each in (tmp_path / "cache").iterdir()] == ["a.tar"]


def test_what_is_not_there_or_not_known_is_a_mistake_of_one_line() -> None:
    with pytest.raises(UserError, match="there is nothing at"):
        local_copy("troubled://shards/none.tar")
    with pytest.raises(UserError, match="cannot be read"):
        local_copy("nosuch://a.tar")
