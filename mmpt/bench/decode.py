"""`mmpt bench decode`: ids a second with a cache, beside `generate` of transformers.

Both write the best id at each step, after the same prompts: the ids are shown to be the same. Gates
of mixtures differ by design (ours are sigmoids, theirs the softmax of the chosen scores), so there
it is shown of a model in which every expert is active and the router is zero. Blocks that are
decoded in parallel follow: see `decode_parallel`.
"""

from collections.abc import Iterator
from itertools import chain

import torch

from mmpt.bench.decode_parallel import parallel_rows
from mmpt.bench.harness import Row, compare, run_rows
from mmpt.bench.olmoe import shape
from mmpt.bench.pair import SMALL, TINY, Case, Pair, dense, show_equal
from mmpt.vocab import Modality

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (1, 16)
CASES = (
    Case(name="tiny", model=dense(expert_hidden=320, **TINY), prompt=16, new=128),
    Case(
        name="tiny",
        model=dense(expert_hidden=320, **TINY),
        prompt=16,
        new=256,
        medium=Modality.IMAGE,
    ),
    Case(name="512 wide", model=dense(expert_hidden=1408, **SMALL), prompt=16, new=64),
    Case(name="512 wide", model=dense(expert_hidden=1408, **SMALL), prompt=256, new=64),
    Case(
        name="4 of 16 experts",
        model=shape(experts=16, active=4, expert_hidden=96, **TINY),
        prompt=16,
        new=128,
    ),
)


def decode(device: str) -> list[Row]:
    """All rows, on a device."""
    return run_rows(chain(_rows(device), parallel_rows(device)))


def _rows(device: str) -> Iterator[Row]:
    for case in CASES:
        for precision in DTYPES:
            for batch in BATCHES:
                yield measure(case, batch, device, precision)


def measure(case: Case, batch: int, device: str, precision: str) -> Row:
    """One row, after the ids were shown to be the same in float32."""
    show_equal(case, batch, device)
    pair = Pair(case, case.model, batch, device).to(DTYPES[precision])
    pair.use_fastest()
    result = compare(pair.ours, pair.theirs, device=device)
    number = batch * case.new
    return Row(
        case=f"{case}, batch {batch}",
        device=device,
        dtype=precision,
        unit="ids/s",
        ours=number / result.ours,
        peer=number / result.peer,
        peer_name=f"transformers {type(pair.peer).__name__}, {pair.setting}",
        ratio=result.ratio,
        low=result.low,
        high=result.high,
    )
