"""The doctor: how much memory a new process can have."""

from pathlib import Path

import pytest

from mmpt import doctor


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_caches_of_the_system_count_as_free(tmp_path: Path) -> None:
    text = "MemTotal: 9000 kB\nMemFree:         100 kB\nMemAvailable:   6000 kB\n"
    write(tmp_path, meminfo=text)
    assert doctor._available_bytes(tmp_path / "meminfo") == 6000 * 1024
    assert doctor._available_bytes(tmp_path / "absent") is None


def test_the_limit_of_a_container_holds(tmp_path: Path) -> None:
    stat = "anon 300\ninactive_file 200\n"
    new = write(tmp_path / "v2", memory__max="1000\n", memory__current="700", memory__stat=stat)
    assert doctor._left_in_cgroup(new) == 500
    write(new, memory__max="max\n")
    assert doctor._left_in_cgroup(new) is None
    (tmp_path / "v1").mkdir()
    files = {"memory__limit_in_bytes": "1000", "memory__usage_in_bytes": "900"}
    write(tmp_path / "v1" / "memory", **files, memory__stat=stat)
    assert doctor._left_in_cgroup(tmp_path / "v1") == 300
    assert doctor._left_in_cgroup(tmp_path / "absent") is None


def test_the_lower_of_both_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 8 << 30)
    monkeypatch.setattr(doctor, "_left_in_cgroup", lambda: 2 << 30)
    assert doctor._memory_gib() == 2.0
    monkeypatch.setattr(doctor, "_left_in_cgroup", lambda: None)
    assert doctor._memory_gib() == 8.0
