"""Muon: orthogonal steps for matrices, Adam's for all else, and a state that can be saved."""

import copy

import pytest
import torch
from torch import nn

from mmpt.muon import Matrices, Muon, orthogonal


def small_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1))


def take_steps(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Fit a fixed random target; the last loss."""
    loss = torch.tensor(0.0)
    for step in steps:
        generator = torch.Generator().manual_seed(step % 3)
        pixels = torch.randn(4, 3, 6, 6, generator=generator)
        loss = (network(pixels) - pixels[:, :2, 1:-1, 1:-1] ** 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (8, 8), (1, 30)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.max() < 1.3
    assert values.median() > 0.6
    assert torch.isfinite(orthogonal(torch.zeros(shape))).all()


def test_what_is_no_kernel_takes_the_steps_of_adam() -> None:
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        Muon(ours.parameters(), lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_a_step_of_a_kernel_is_about_as_long_as_one_of_adam() -> None:
    network = small_network()
    kernel = network.get_parameter("0.weight")
    before = kernel.detach().clone()
    take_steps(network, Muon(network.parameters(), lr=0.01, weight_decay=0.0), range(1))
    moved = (kernel - before).square().mean().sqrt()
    assert 0.001 < moved < 0.01  # a first step of Adam moves each weight by the rate


def test_it_learns_and_leaves_alone_what_has_no_gradient() -> None:
    network = small_network()
    unused = nn.Parameter(torch.ones(2, 2, 3, 3))
    optimizer = Muon([*network.parameters(), unused], lr=0.01, weight_decay=0.1)
    first = take_steps(network, optimizer, range(1))
    assert take_steps(network, optimizer, range(90)) < 0.7 * first
    assert torch.equal(unused, torch.ones(2, 2, 3, 3))


def test_a_saved_state_goes_on_bit_equal() -> None:
    whole, parts = small_network(), small_network()
    optimizer = Muon(whole.parameters(), lr=0.01, weight_decay=0.1)
    take_steps(whole, optimizer, range(6))
    before = Muon(parts.parameters(), lr=0.01, weight_decay=0.1)
    take_steps(parts, before, range(3))
    after = Muon(parts.parameters(), lr=0.01, weight_decay=0.1)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    take_steps(parts, after, range(3, 6))
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def step_of_one_kernel(kernel: torch.Tensor, mean: torch.Tensor, lr: float) -> None:
    """The arithmetic that the shipped codecs were trained with, operation by operation."""
    assert kernel.grad is not None
    mean.lerp_(kernel.grad, 1 - 0.9)
    matrix = kernel.grad.lerp(mean, 0.9).flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-9)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    change = (x if wide else x.T).mul(0.2 * max(matrix.shape) ** 0.5)
    kernel.mul_(1 - lr * 0.1).add_(change.view_as(kernel), alpha=-lr)


def test_codecs_train_bit_equal_to_before() -> None:
    ours, theirs = small_network(), small_network()
    optimizer = Muon(ours.parameters(), lr=0.01, weight_decay=0.1)
    means = [torch.zeros_like(kernel) for kernel in theirs.parameters()]
    for step in range(4):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            generator = torch.Generator().manual_seed(step)
            one.grad = other.grad = torch.randn(one.shape, generator=generator)
        optimizer.step()
        with torch.no_grad():
            for kernel, mean in zip(theirs.parameters(), means, strict=True):
                if kernel.ndim == 4:
                    step_of_one_kernel(kernel, mean, 0.01)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.ndim != 4 or torch.equal(one, other)


def change_of(parameter: torch.Tensor, matrices: Matrices) -> torch.Tensor:
    """What a step of rate 1 adds to a parameter whose gradient is itself."""
    moved = nn.Parameter(parameter.clone())
    moved.grad = parameter.clone()
    Muon([moved], lr=1.0, weight_decay=0.0, matrices={moved: matrices}).step()
    return moved.detach() - parameter


WHOLE = Matrices(lambda matrix: [matrix], lambda parts: parts[0])
HALVES = Matrices(lambda both: list(both.split(5, -1)), lambda parts: torch.cat(parts, -1))


def test_each_expert_of_a_stack_moves_as_if_alone() -> None:
    stack = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    stack[1] *= 1000  # one expert's large gradient takes nothing from the others
    together = change_of(stack, WHOLE)
    for expert, change in zip(stack, together, strict=True):
        torch.testing.assert_close(change, change_of(expert, WHOLE), rtol=1e-4, atol=1e-5)


def test_parts_of_one_parameter_move_as_if_alone() -> None:
    stack = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    halves = torch.cat([change_of(half, WHOLE) for half in stack.split(5, -1)], -1)
    together = change_of(stack, HALVES)
    torch.testing.assert_close(together, halves, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, change_of(stack, WHOLE), rtol=0.01)
