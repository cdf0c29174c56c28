"""`mmpt report`: training runs side by side on one page of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpt.config import write_atomic
from mmpt.eval.page import progress, training, work
from mmpt.eval.page.panels import style
from mmpt.eval.runs import Run, read_runs
from mmpt.page.curves import hue_legend
from mmpt.page.document import document


def report_command(runs: Sequence[str], *, out: Path = Path("report.html")) -> dict[str, Any]:
    """One page that shows and compares training runs: RUNS are folders that mmpt train wrote to.

    It holds its charts in itself, and shows runs that are still going as far as they are.
    """
    read = read_runs(runs)
    write_atomic(out, render_runs(read))
    return {"report": str(out), "runs": {run.name: run.num_steps for run in read}}


def render_runs(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    chapters = {
        "loss": ("How it learns", training.losses(runs)),
        "held-out": ("What it makes of what it never saw", progress.heldout(runs)),
        "signals": ("Early signals", progress.signals(runs)),
        "optimisation": ("Rates, gradients, skipped steps", training.optimisation(runs)),
        "mix": ("What it reads", work.mix(runs)),
        "experts": ("Who does the work", work.experts(runs)),
        "time": ("Where the time goes", work.time(runs)),
        "samples": ("What it makes", training.samples(runs)),
        "recipes": ("What differs" if len(runs) > 1 else "Its recipe", training.recipes(runs)),
    }
    title = runs[0].name
    if len(runs) > 1:
        title, legend = f"{len(runs)} training runs", hue_legend([run.name for run in runs])
        for name in ("loss", "held-out", "signals", "optimisation", "experts", "time"):
            heading, content = chapters[name]
            chapters[name] = heading, content and legend + content
    optional = ("held-out", "signals", "samples")
    chapters = {k: v for k, v in chapters.items() if v[1] or k not in optional}
    head = training.overview(runs)
    return document(title, training.lead(runs), head, chapters, style=style())
