"""`mmpt bench moe`: the peer computes the same, a wrong one is noticed, FLOPs are counted right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpt.bench import harness, moe
from mmpt.bench.moe import ByMedium, Choice, Pair, Shape

pytest.importorskip("transformers")
FEW = Shape(width=16, hidden=8, experts=4, active=2, ids=24)
MEDIA = Shape(width=16, hidden=8, experts=3, active=1, ids=24)
PAIRS = ((Choice, FEW), (ByMedium, MEDIA))


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "REPETITIONS", 3)
    monkeypatch.setattr(moe, "SIDE", {"cpu": 64})
    monkeypatch.setattr(moe, "CHOICES", (FEW,))
    monkeypatch.setattr(moe, "MEDIA", (MEDIA,))


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
@pytest.mark.parametrize("setting", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("precision", moe.DTYPES)
def test_outputs_and_gradients_are_those_of_the_peer(
    kind: type[Pair], shape: Shape, setting: str, precision: str
) -> None:
    pair = kind(shape, "cpu", precision)  # type: ignore[call-arg] # those two have no config
    pair.use(setting)
    assert moe.show_equal(pair) < moe.FAR[precision]


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_a_peer_with_another_weight_is_not_timed(kind: type[Pair], shape: Shape) -> None:
    pair = kind(shape, "cpu", "fp32")  # type: ignore[call-arg] # those two have no config
    pair.use("eager")
    with torch.no_grad():
        pair.peer.experts.down_proj[1, 0] += 1
    with pytest.raises(RuntimeError, match="the output differs"):
        moe.show_equal(pair)


def test_a_peer_that_chooses_otherwise_is_not_timed() -> None:
    pair = Choice(FEW, "cpu", "fp32")
    pair.use("eager")
    torch.nn.init.normal_(pair.peer.gate.weight)
    with pytest.raises(RuntimeError, match="of the chosen experts are the peer's"):
        moe.show_equal(pair)


@pytest.mark.parametrize(("kind", "shape"), PAIRS)
def test_flops_are_those_of_the_experts(kind: type[Pair], shape: Shape) -> None:
    pair = kind(shape, "cpu", "fp32")  # type: ignore[call-arg] # those two have no config
    counter = FlopCounterMode(display=False)
    with counter:  # which cannot follow autograd.grad
        pair.ours()
    router = 2 * shape.ids * shape.width * shape.experts if kind is Choice else 0
    assert counter.get_total_flops() == shape.flops / 3 + router


def test_rows_say_what_was_fastest_and_the_share_of_the_peak() -> None:
    rows = moe.moe("cpu")
    assert len(rows) == 2 * 2 * len(moe.DTYPES)
    for row in rows:
        assert row.low <= row.ratio <= row.high
        if row.peer_name == "peak":
            assert row.ratio == pytest.approx(row.ours / row.peer)
        else:
            assert row.peer_name.split(", ")[1] in ("eager", "grouped_mm", "batched_mm")
            assert row.ratio == pytest.approx(row.peer / row.ours)


def test_an_implementation_that_would_copy_too_much_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "batched_mm" in moe._settings(FEW, 4)
    monkeypatch.setattr(moe, "MOST_COPIED", 1000)
    assert "batched_mm" not in moe._settings(FEW, 4)
