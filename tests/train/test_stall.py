import json
import os
import re
import socket
import threading
import time
from dataclasses import replace

import pytest

from mmpt.config import to_toml
from mmpt.train.pretrain import train
from mmpt.train.stall import Pulse, Watch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watches(tmp_path, clock):
    """Three ranks of this process, whose clock stands still."""
    options = {"count": 3, "seconds": 600.0, "clock": clock}
    return [Watch(tmp_path / "alive", Pulse(), rank=rank, **options) for rank in range(3)]


def pulse(watch, step, *phases):
    watch._pulse.step = step
    for phase in phases:
        watch._pulse.begin(phase)
    watch.tell()


def warnings(caplog):
    return [record.message for record in caplog.records]


def test_who_came_least_far_is_named_once_for_each_stall(watches, clock, caplog):
    for watch in watches:
        pulse(watch, 120, "data", "forward", *(["backward"] if watch is not watches[2] else []))
    for clock.now in (0.0, 300.0, 599.0):
        watches[0].look()
    assert warnings(caplog) == []
    for clock.now in (600.0, 700.0):
        watches[0].look()
    [line] = warnings(caplog)
    assert line.startswith("rank 2 has not finished step 120 for 600 s (in forward, at ")
    assert line.endswith(f"host {socket.gethostname()}, pid {os.getpid()})")
    pulse(watches[2], 120, "backward")  # it goes on, and stalls again
    for clock.now in (800.0, 1400.0):
        watches[0].look()
    assert sum("rank 2" in line for line in warnings(caplog)) == 2


def test_many_slow_phases_are_no_stall(watches, clock, caplog):
    for clock.now in (0.0, 500.0, 1000.0, 1500.0):
        for watch in watches:
            pulse(watch, 7, "forward")
        watches[0].look()
    assert warnings(caplog) == []


def test_ranks_that_ended_or_write_just_now_are_left_alone(watches, clock, caplog, tmp_path):
    for watch in watches[:2]:
        pulse(watch, 1, "data")
    (tmp_path / "alive" / "rank-00001.json").write_text('{"rank": 1, "st')
    for clock.now in (0.0, 601.0):
        watches[0].look()
    assert all("rank 0" in line for line in warnings(caplog))


def test_the_wall_clock_may_go_backwards(tmp_path, caplog, monkeypatch):
    walls = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(walls)))
    stands = Pulse()
    with Watch(tmp_path / "alive", stands, rank=0, count=1, seconds=0.2):
        for _ in range(20):
            stands.begin("data")
            time.sleep(0.02)
        assert warnings(caplog) == []
        time.sleep(0.5)
    [line] = warnings(caplog)
    assert re.match("rank 0 has not finished step 0 for [01] s ", line)
    assert not (tmp_path / "alive").exists()


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, another, vocabulary):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "alive").write_text("in the way")
    assert train(another(steps=2), tmp_path / "run", vocabulary=vocabulary, progress=False).finished
    assert [t.name for t in threading.enumerate() if t.name == "watch"] == []


def test_the_rank_that_sleeps_is_named(tmp_path, recipe, vocabulary, run_script):
    vocabulary.save(tmp_path / "vocabulary.json")
    path, out = tmp_path / "recipe.toml", tmp_path / "out"
    data = replace(recipe.data, streams=2)
    path.write_text(
        to_toml(replace(recipe, vocabulary=str(tmp_path / "vocabulary.json"), data=data))
    )
    run_script("stalled.py", path, out)
    [line] = [line for line in (out / "log").read_text().splitlines() if "step 2" in line]
    assert "rank 1 has not finished step 2 for " in line
    assert "(in forward, at stalled.py:" in line
    assert f"sleep_and_score, host {socket.gethostname()}, pid {(out / 'pid').read_text()})" in line
    done = [json.loads(each)["step"] for each in (out / "run" / "metrics.jsonl").open()]
    assert done == [1, 2, 3]
