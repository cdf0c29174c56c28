"""What `mmpt plan` prints: for people a table, for machines the numbers."""

from typing import Any

from mmpt.plan.layouts import Cost, Survey
from mmpt.plan.machines import Machine
from mmpt.plan.workload import Workload
from mmpt.train.pretrain import unusual_rates

SHOWN = 12  # layouts, of those that fit and of those that do not
COLUMNS = ("peak GB", "state", "activ.", "gather", "reduce", "all2all", "tensor", "step s")
HEAD = f"{'replicate x outer x expert x tensor':36}{'recompute':10}"
HEAD += "".join(f"{name:>10}" for name in COLUMNS) + "     MFU"


class Report(dict[str, Any]):
    """A result that prints itself as lines; `lines` are no part of it."""

    def __init__(self, values: dict[str, Any], lines: list[str]) -> None:
        super().__init__(values)
        self._lines = lines

    def __str__(self) -> str:
        return "\n".join(self._lines)


def of_model(work: Workload) -> Report:
    """Parameters and operations."""
    summary = work.summary()
    lines = [
        f"{summary['parameters']:,} parameters; of a token, with {work.recipe.data.length} keys"
    ]
    lines.append(f"  {'':8}{'active':>18}{'share':>8}{'GFLOPs forward':>16}{'of the mix':>12}")
    for name, active in summary["active parameters"].items():
        flops, share = summary["flops per token, forward"][name], summary["active share"][name]
        mixed = summary["mix"][name]
        lines.append(f"  {name:8}{active:>18,}{share:>8.1%}{flops / 1e9:>16.4g}{mixed:>12.1%}")
    lines += _activation(work, summary["auxiliary parameters"])
    tokens, flops = summary["tokens per step"], summary["flops per step"]
    lines.append(f"  a step: {tokens:,} tokens, {flops:.4g} FLOPs")
    return Report({"model": summary}, lines)


def _activation(work: Workload, num_auxiliary: int) -> list[str]:
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in work.model.activation_rates.items())
    lines = [f"  of a layer's weights an id meets: {rates}"]
    if unlikely := unusual_rates(work.model):
        lines.append(f"  warning: {unlikely}")
    if num_auxiliary:
        lines.append(f"  {num_auxiliary:,} parameters are of auxiliary routers, trained afterwards")
    return lines


def of_layouts(work: Workload, found: Survey, count: int, machine: Machine) -> Report:
    """The model, layouts with their costs, and the one to take."""
    model = of_model(work)
    lines = [str(model), "", f"{count} x {machine.name} ({machine.node} a node), per rank:", HEAD]
    if found.own:
        fits = "" if found.own.fits else " and does not fit"
        lines.append(_line(found.own) + f"  is the recipe's own{fits}")
    lines += [_line(each) for each in found.fitting[:SHOWN]]
    lines += _rest(len(found.fitting), "that fit")
    if found.refused:
        reasons = _by_reason(found.refused)
        lines += ["", "not possible:", *reasons[:SHOWN]]
        lines += _rest(len(reasons), "that are not possible")
    lines += ["", _advice(found, count)]
    values: dict[str, Any] = {
        **model,
        "gpus": count,
        "machine": vars(machine),
        "own": found.own.row() if found.own else None,
        "layouts": [each.row() for each in found.fitting],
        "refused": [{"layout": layout, "reason": why} for layout, why in found.refused],
        "recommended": overrides(found.best) if found.best else None,
    }
    return Report(values, lines)


def overrides(cost: Cost) -> list[str]:
    """What turns a recipe into one of this layout."""
    layout, data = cost.layout, cost.work.recipe.data
    sides = {"replicate": layout.replicate, "expert": layout.expert, "tensor": layout.tensor}
    values = [f"parallel.{name}={size}" for name, size in sides.items()]
    values.append(f"parallel.recompute={cost.recompute}")
    if data.streams % layout.num_data:
        values.append(f"data.streams={layout.num_data}")
    return values


def _advice(found: Survey, count: int) -> str:
    if found.best is None:
        return f"nothing fits on {count}: use more of them, larger ones, or fewer rows a batch"
    return f"fastest that fits: {' '.join(overrides(found.best))}"


def _line(cost: Cost) -> str:
    row = cost.row()
    memory, sent = row["memory"], row["sent"]
    state = sum(memory[name] for name in ("weights", "gradients", "optimizer", "average"))
    reduced = sent["reduce-scatter"] + sent["all-reduce"] - sent["of which tensors"]
    numbers = [memory["peak"], state, memory["activations"], sent["all-gather"], reduced]
    numbers += [sent["all-to-all"], sent["of which tensors"], row["seconds"]["step"]]
    values = "".join(f"{number:>10.3g}" for number in numbers)
    return f"{cost.layout!s:36}{cost.recompute:10}{values}{row['mfu']:>8.1%}"


def _by_reason(refused: list[tuple[str, str]]) -> list[str]:
    layouts: dict[str, list[str]] = {}
    for layout, why in refused:
        layouts.setdefault(why, []).append(layout)
    return [
        f"  {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}"
        for why, names in layouts.items()
    ]


def _rest(number: int, what: str) -> list[str]:
    return [f"  ... and {number - SHOWN} more {what} (--json)"] if number > SHOWN else []
