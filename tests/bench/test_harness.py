"""The harness: a slower peer shows, bounds hold, what cannot be measured is refused."""

import time

import pytest
import torch

from mmpt.bench import bench, harness
from mmpt.bench.harness import Row, best_seconds, check_device, compare
from mmpt.config import UserError


def test_a_peer_that_takes_three_times_as_long_has_a_ratio_of_three() -> None:
    result = compare(lambda: time.sleep(0.004), lambda: time.sleep(0.012))
    assert result.ratio == pytest.approx(3, rel=0.2)
    assert result.low <= result.ratio <= result.high
    assert result.ours == pytest.approx(0.004, rel=0.3)


def test_calls_alternate_and_who_goes_first_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "SHORTEST", 1e-9)
    calls: list[str] = []
    compare(lambda: calls.append("ours"), lambda: calls.append("peer"))
    timed = calls[2:]  # after a first call of each
    assert timed[:4] == ["ours", "peer", "peer", "ours"]
    assert timed.count("ours") == timed.count("peer") >= 9


def test_the_ratio_of_best_times_lies_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        times = iter((torch.rand(20, generator=generator) + 0.1).tolist())
        monkeypatch.setattr(harness, "_seconds", lambda *_, times=times: next(times))
        result = compare(lambda: 1, lambda: 2)
        assert result.low <= result.ratio <= result.high


def test_the_best_time_is_the_best_of_its_parts() -> None:
    best, parts = best_seconds(lambda: None)
    assert best == min(parts)


def test_a_row_becomes_json_of_the_agreed_keys() -> None:
    row = Row(
        case="a",
        device="cpu",
        dtype="fp32",
        unit="ms",
        ours=1.23456789,
        peer=2.0,
        peer_name="b",
        ratio=1.62,
        low=1.5,
        high=1.7,
    )
    keys = ["case", "device", "dtype", "unit", "ours", "peer", "peer_name", "ratio", "low", "high"]
    assert list(row.as_dict()) == keys
    assert row.as_dict()["ours"] == 1.2346


def test_what_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="there are: codecs"):
        bench("codec")
    with pytest.raises(UserError, match="use cpu or cuda"):
        check_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            check_device("cuda")
