"""Steps of real processes send the bytes and hold the memory that the plan says."""

from dataclasses import replace

import pytest

from mmpt.config import UserError
from mmpt.plan.calibrate import this_machine
from mmpt.plan.measure import compare, measure, planned_bytes, prepare
from mmpt.plan.memory import memory
from mmpt.plan.traffic import Layout
from mmpt.plan.workload import Workload
from mmpt.train.optim import OptimConfig
from mmpt.train.parallel import ParallelConfig


@pytest.fixture
def short(recipe):
    """Few rows, so that a step is short."""
    return replace(recipe, data=replace(recipe.data, rows=4))


# what experts take and give is whole rows, but for bf16 on CPUs, where their number is rounded up
@pytest.mark.parametrize(
    ("count", "sides", "changes"),
    [
        (1, {"recompute": "full"}, {}),
        (2, {}, {"precision": "bf16", "accumulate": 2}),
        (2, {"expert": 2, "recompute": "full"}, {}),
        (2, {"replicate": 2}, {"ema": 0.9, "optim": OptimConfig(kind="muon")}),
        (2, {"tensor": 2}, {}),
        (4, {"expert": 2, "recompute": "selective"}, {"optim": OptimConfig(kind="muon")}),
    ],
)
def test_bytes_are_exact_and_memory_is_near(short, tmp_path, count, sides, changes):
    recipe = replace(prepare(short, tmp_path), parallel=ParallelConfig(**sides), **changes)
    found = measure(recipe, count, tmp_path / "case", steps=1)
    work, layout = Workload.of(recipe, found.mix), Layout.of(recipe.parallel, count)
    assert found.bytes == planned_bytes(work, layout)
    assert memory(work, layout).peak == pytest.approx(found.memory, rel=0.2)


def test_times_are_compared(short):
    [row] = compare(short, [(1, {})])["cases"]
    # others use these cores: a bound that a plan of another order of magnitude would miss
    assert 0.1 < row["planned work seconds"] / row["work seconds"] < 10


def test_a_core_that_processes_share_is_slower_for_each(short):
    machines = [this_machine(Workload.of(short), processes=count) for count in (1, 16)]
    assert machines[1].fp32 < machines[0].fp32


def test_what_does_not_fit_here_is_refused(large):
    with pytest.raises(UserError, match=r"GB, of .* here; make it smaller"):
        compare(replace(large, data=replace(large.data, rows=4)))
