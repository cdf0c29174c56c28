"""`mmpt bench decode`: the peer writes the same ids, and a wrong one is noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmpt.bench import decode, decode_parallel, harness, pair
from mmpt.bench.decode_parallel import Blocks, Setup
from mmpt.bench.olmoe import shape
from mmpt.bench.pair import Case, Pair, dense, show_equal
from mmpt.vocab import Modality

pytest.importorskip("transformers")
SIZES = {"width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "expert_hidden": 24}
TEXT = Case(name="text", model=dense(**SIZES), prompt=6, new=8)
CASES = (
    TEXT,
    replace(TEXT, name="image", new=9, medium=Modality.IMAGE),
    replace(TEXT, name="experts", model=shape(experts=4, active=2, **SIZES)),
)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "REPETITIONS", 3)
    monkeypatch.setattr(pair, "CACHES", pair.CACHES[:2])
    monkeypatch.setattr(pair, "NUM_TEXT", 50)
    monkeypatch.setattr(pair, "NUM_CODES", 40)
    monkeypatch.setattr(decode_parallel, "PASSES", {9: (2,)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_both_write_the_same_ids(case: Case, batch: int) -> None:
    show_equal(case, batch, "cpu")  # which raises where they do not
    ids = Pair(case, case.model, batch, "cpu").ours()
    assert ids.shape == (batch, case.new)
    assert len(np.unique(ids)) > 2  # it is no loop of one id


def test_a_peer_with_another_weight_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Pair.copy_weights

    def wrongly(both: Pair) -> None:
        copy(both)
        torch.nn.init.ones_(both.peer.model.layers[0].mlp.down_proj.weight)

    monkeypatch.setattr(Pair, "copy_weights", wrongly)
    with pytest.raises(RuntimeError, match="of the ids are the peer's"):
        show_equal(TEXT, 2, "cpu")


def test_a_row_says_what_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "CASES", (replace(TEXT, new=2),))
    monkeypatch.setattr(decode, "BATCHES", (2,))
    monkeypatch.setattr(decode_parallel, "SETUPS", {"cpu": ()})
    rows = decode.decode("cpu")
    assert [row.dtype for row in rows] == ["fp32", "bf16"]
    for row in rows:
        assert row.case == "text, 2 ids of text after 6 ids, batch 2"
        assert row.peer_name.startswith("transformers Qwen3ForCausalLM, ")
        assert row.low <= row.ratio <= row.high
        assert row.ratio == pytest.approx(row.ours / row.peer)


BLOCK = Setup(name="block", model=dense(**SIZES), codes=9, batch=3, speculate=True)


def test_blocks_are_timed_beside_one_code_a_pass_and_the_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode_parallel, "SETUPS", {"cpu": (BLOCK,)})
    ours, speculated, peers = decode_parallel.parallel_rows("cpu")
    assert ours.case == peers.case == "block, 9 codes in 2 passes and a commit (NFE 3), batch 3"
    assert speculated.case.startswith("block, 9 codes self-speculated, random weights: ")
    assert ours.peer_name == speculated.peer_name == "mmpt, one code a pass"
    assert peers.peer_name.startswith("transformers Qwen3ForCausalLM, ")
    for row in (ours, peers, speculated):
        assert row.low <= row.ratio <= row.high


def test_a_pass_that_sees_too_much_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(BLOCK, "cpu")
    blocks.pair.to(torch.float64)
    blocks.show_exact()
    forward = decode_parallel.joint_forward

    def later(model, joint):
        joint.limit = joint.limit + 1
        return forward(model, joint)

    monkeypatch.setattr(decode_parallel, "joint_forward", later)
    with pytest.raises(RuntimeError, match="a block's logits are off"):
        blocks.show_exact()
