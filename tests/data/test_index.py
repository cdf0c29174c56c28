"""Indexed shards: whatever happens to the file, all that was promised is given or reported."""

import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mmpt.config import UserError
from mmpt.data import sources
from mmpt.data.index import (
    build_index,
    index_path,
    index_shards,
    load_index,
    save_index,
)
from mmpt.data.indexed import read_indexed, samples_of
from mmpt.data.tars import Damage, Sample, read_samples
from tests.data.test_shards import make_shard, write_tar

LONG = "folder/" + "long" * 40


def shard_of_plain_webdataset(path: Path) -> Path:
    """Its times are fractions, so that every member has an extended header."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(6):
            key = LONG + str(number) if number % 2 else f"k{number}"
            writer.write({"__key__": key, "txt": f"text {number}", "json": {"n": number}})
    return path


def by_key(items) -> dict[str, Sample]:
    return {item.key: item for item in items if isinstance(item, Sample)}


@pytest.mark.parametrize("make", [make_shard, shard_of_plain_webdataset])
def test_reading_by_the_index_gives_what_streaming_gives(tmp_path, make):
    path = make(tmp_path / "a.tar")
    streamed = list(read_samples(path))
    save_index(build_index(path))
    index = load_index(path)
    assert list(read_indexed(index)) == streamed == list(samples_of(path))
    assert list(index.keys()) == [sample.key for sample in streamed]
    assert index.promised == len(streamed) > 3
    assert index.num_bytes == path.stat().st_size


def test_a_shard_that_was_damaged_when_it_was_indexed_promises_that_damage(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [("a.txt", b"1"), ("b.txt", b"2"), ("../c.txt", b"3"), ("a.json", b'"4"')],
    )
    data = bytearray(path.read_bytes())
    data[148:156] = b"notasum!"  # of the first header
    path.write_bytes(data)
    streamed = list(read_samples(path))
    save_index(build_index(path))
    found = list(samples_of(path))
    assert {type(item) for item in found} == {Sample, Damage}
    assert by_key(found) == by_key(streamed)
    assert [item for item in found if isinstance(item, Damage)] == [
        item for item in streamed if isinstance(item, Damage)
    ]
    assert load_index(path).promised == len(streamed)


def mutate(data: bytes, rng: np.random.Generator) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Damaged bytes, and the ranges (begin, end, shift) of the old ones that are still there."""
    size, kind = len(data), rng.integers(7)
    at = int(rng.integers(size))
    length = int(min(size - at, rng.choice([1, 37, 512, 5000, 40_000])))
    if kind == 0:  # flipped bits of one byte
        junk = bytes([data[at] ^ int(rng.integers(1, 256))])
        return data[:at] + junk + data[at + 1 :], [(0, at, 0), (at + 1, size, 0)]
    if kind == 1:  # a hole of zeros
        return data[:at] + bytes(length) + data[at + length :], [(0, at, 0), (at + length, size, 0)]
    if kind == 2:  # noise
        return data[:at] + rng.bytes(length) + data[at + length :], [
            (0, at, 0),
            (at + length, size, 0),
        ]
    if kind == 3:  # the end is cut
        return data[:at], [(0, at, 0)]
    if kind == 4:  # bytes are gone
        return data[:at] + data[at + length :], [(0, at, 0), (at + length, size, -length)]
    if kind == 5:  # bytes came in between
        return data[:at] + rng.bytes(length) + data[at:], [(0, at, 0), (at, size, length)]
    at = at // 512 * 512  # a header's checksum
    return data[:at] + b"\xff" * 512 + data[at + 512 :], [(0, at, 0), (at + 512, size, 0)]


@pytest.mark.parametrize(
    "name", ["emoji-heldout-0000.tar", "voices-heldout-0000.tar", "plain webdataset"]
)
def test_whatever_happens_to_a_shard_what_is_whole_is_used_and_all_is_accounted_for(tmp_path, name):
    path = tmp_path / "a.tar"
    if name == "plain webdataset":
        shard_of_plain_webdataset(path)
    else:
        [real] = [shard for shard in sources.sampler_shards() if shard.name == name]
        path.write_bytes(real.read_bytes())
    whole = path.read_bytes()
    save_index(build_index(path))
    index, before = load_index(path), by_key(read_samples(path))
    began = time.monotonic()
    for seed in range(170):
        rng = np.random.default_rng(seed)
        data, kept = mutate(whole, rng)
        if rng.random() < 0.3:
            data, again = mutate(data, rng)
            kept = [
                (max(b, b2 - s), min(e, e2 - s), s + s2)
                for b, e, s in kept
                for b2, e2, s2 in again
                if max(b, b2 - s) < min(e, e2 - s)
            ]
        path.write_bytes(data)
        found = list(read_indexed(index))
        assert len(found) == index.promised
        used = by_key(found)
        for number, key in enumerate(index.keys()):
            start, end = int(index.starts[number]), int(index.starts[number] + index.sizes[number])
            if any(begin <= start and end <= stop for begin, stop, _ in kept):
                assert key in used, (seed, key)
            if key in used:
                assert used[key].members == before[key].members
    assert time.monotonic() - began < 60


def test_a_shard_cut_at_any_block_gives_what_is_whole(tmp_path):
    path = make_shard(tmp_path / "a.tar", 3)
    save_index(build_index(path))
    index, whole = load_index(path), path.read_bytes()
    ends = (index.starts + index.sizes).tolist()
    for cut in range(0, len(whole) + 1, 512):
        path.write_bytes(whole[:cut])
        found = list(read_indexed(index))
        assert [type(item) for item in found] == [Sample if end <= cut else Damage for end in ends]
        streamed = [item for item in read_samples(path) if isinstance(item, Sample)]
        assert len(streamed) >= sum(end <= cut for end in ends)


def test_very_many_empty_members_take_little_time_and_memory(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(20_000):
            tar.addfile(tarfile.TarInfo(f"{number:06d}.txt"))
    began = time.monotonic()
    index = build_index(path)
    assert len(index) == 20_000
    assert sum(isinstance(item, Sample) for item in read_indexed(index)) == 20_000
    assert time.monotonic() - began < 60


def test_samples_that_moved_are_where_they_are_now(tmp_path):
    path = make_shard(tmp_path / "a.tar")
    save_index(build_index(path))
    whole = path.read_bytes()
    path.write_bytes(b"x" * 100 + whole)
    for sample in samples_of(path):
        assert isinstance(sample, Sample)
        assert path.read_bytes()[sample.offset : sample.end] in whole


def test_the_command_indexes_shards_once(tmp_path):
    paths = [str(make_shard(tmp_path / f"{name}.tar")) for name in "ab"]
    assert index_shards(paths, workers=2)["written"] == 2
    result = index_shards(paths)
    assert (result["written"], result["samples"], result["damages"]) == (0, 8, 0)
    data = Path(paths[1]).read_bytes()
    Path(paths[0]).write_bytes(data[: len(data) // 2])
    again = index_shards(paths, again=True)
    assert again["written"] == 2
    assert again["damages"] > 0
    assert again["samples"] < 8


def test_a_shard_that_was_replaced_is_said(tmp_path, caplog):
    path = make_shard(tmp_path / "a.tar")
    save_index(build_index(path))
    write_tar(path, [("other.txt", b"text")])
    assert all(isinstance(item, Damage) for item in samples_of(path))
    assert "if it was replaced: mmpt data index --again" in caplog.text


@pytest.mark.parametrize("junk", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_file_that_is_no_index_is_a_mistake_of_one_line(tmp_path, junk):
    path = make_shard(tmp_path / "a.tar")
    index_path(path).write_bytes(junk)
    with pytest.raises(UserError, match="is no index of a shard"):
        list(samples_of(path))


def test_an_index_takes_less_than_a_hundred_bytes_a_sample(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3000):
            info = tarfile.TarInfo(f"document-{number:09d}.txt")
            tar.addfile(info)
    assert save_index(build_index(path)).stat().st_size < 100 * 3000
