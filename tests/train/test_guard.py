"""Which steps are kept out of the weights, and that a run skips them."""

import json
import math

import pytest
import torch

from mmpt.config import UserError
from mmpt.train.guard import Guard, GuardConfig
from mmpt.train.pretrain import pretrainer


@pytest.fixture
def calm():
    """A guard that has seen forty losses around one."""
    guard = Guard(GuardConfig())
    for step in range(40):
        assert guard.judge({"the loss": 1 + 0.1 * math.sin(step)}) is None
    return guard


def test_what_lies_six_deviations_above_is_a_spike(calm):
    deviation = 0.1 / 2**0.5
    assert calm.judge({"the loss": 1 + 5 * deviation}) is None
    assert calm.judge({"the loss": 0.0}) is None  # far below
    assert calm.judge({"the loss": 3.0}) == "the loss spikes"
    assert calm.judge({"the loss": 1.0, "the gradient": math.inf}) == "the gradient is not finite"
    assert calm.skipped == {"the loss spikes": 1, "the gradient is not finite": 1}
    assert calm.in_a_row == 2
    assert calm.judge({"the loss": 1.0}) is None
    assert calm.in_a_row == 0


def test_each_value_is_judged_by_its_own_past(calm):
    assert calm.judge({"the speech loss": 100.0}) is None  # it has none yet
    assert calm.judge({"the speech loss": 100.0, "the loss": 3.0}) == "the loss spikes"


def test_a_loss_that_stays_high_is_not_skipped_for_ever(calm):
    skipped = [calm.judge({"the loss": 3.0}) is not None for _ in range(20)]
    assert skipped[0]
    assert not skipped[-1]


def test_it_goes_on_as_it_was(calm):
    other = Guard(GuardConfig())
    other.load_state_dict(json.loads(json.dumps(calm.state_dict())))
    for value in (1.2, 3.0, 1.0, math.nan):
        assert other.judge({"the loss": value}) == calm.judge({"the loss": value})
    assert other.state_dict() == calm.state_dict()


def test_without_sigmas_only_what_is_not_finite_is_skipped():
    guard = Guard(GuardConfig(sigmas=0.0))
    assert not any(guard.judge({"the loss": value}) for value in [1.0] * 50 + [1e9])
    assert guard.judge({"the loss": math.nan})


@pytest.mark.parametrize("options", [{"sigmas": -1.0}, {"window": 3}, {"stall": 0.0}])
def test_values_without_sense_are_refused(options):
    with pytest.raises(UserError, match="guard"):
        GuardConfig(**options)


def test_a_run_skips_a_spike_and_leaves_its_weights(tmp_path, recipe, vocabulary):
    trainer = pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary)
    for _ in range(40):
        trainer.guard.judge({"the loss": 0.01, "the gradient": 0.01})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step()
    assert metrics["skipped"] == "the loss spikes"
    assert metrics["bad_steps"] == 1
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_step_with_one_hidden_state_that_is_nan_is_skipped(tmp_path, recipe, vocabulary):
    trainer = pretrainer(recipe, tmp_path / "run", vocabulary=vocabulary)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}

    def spoil(module, inputs, output):
        y_BTD = output.clone()
        y_BTD[0, 3] = math.nan
        return y_BTD

    hook = trainer.model.layers[0].attention.register_forward_hook(spoil)
    metrics = trainer.step()
    assert (metrics["skipped"], metrics["bad_steps"]) == ("the loss is not finite", 1)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert all(b.isfinite().all() for b in trainer.model.buffers())
    hook.remove()
    assert trainer.step()["skipped"] is None
