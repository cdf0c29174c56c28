"""savings.html: what variants save, as a table, beside the curves that it was read from."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmpt.eval.page.panels import figure, style
from mmpt.eval.savings_curves import ALL, Comparison, Saving
from mmpt.eval.savings_variants import DENSE
from mmpt.page.curves import Curve, hue_legend, line_panel, run_hue
from mmpt.page.document import document, tile
from mmpt.page.frame import Frame, compact
from mmpt.page.markup import DASH, chip, duration, escape, facts, number, percent, table, tag

METHOD = """eta: the compute at which the dense model reaches the held-out loss that a variant ends
with, over the compute of the variant. All runs of a seed read the same rows in the same order, at a
constant learning rate; dense runs go on for twice the steps. Losses are those under the router that
inference uses. A dense curve is made to fall (isotonic regression, evenly weighted) and is linear
in the logarithm of the compute between evaluations; the variant's loss is as measured. Nothing is
extrapolated: "above" says that a dense run did not reach the loss at all, "below" that it was there
at its first evaluation. Each run is compared with the dense one of its seed; given are the
geometric mean over seeds and its 95% interval (Student's t of log eta). FLOPs are counted, routers
included; time is that of the median training step, times the steps. All media together are averaged
by the ids that were trained on. Causality gap: held-out nats under the router of inference less
those under that of training, on equal rows; a dash where it is the same router. The training of
auxiliary routers counts as compute of the variant."""


def render_savings(compared: Comparison, about: Mapping[str, Any], command: str) -> str:
    """The page as HTML. about: what else is known of the runs; command: that makes them."""
    loss = "Held-out nats per id over training compute: the mean over seeds, from least to largest."
    saved = "eta of each variant over its own compute so far: what it would be had it ended there."
    again = tag("p", "The command that makes this page:", class_="prose")
    again += tag("pre", tag("code", escape(command)), tabindex=0)
    chapters = {
        "savings": (
            "What the variants save",
            tag("h3", "in compute")
            + _table(compared, "flops")
            + tag("h3", "in time")
            + _table(compared, "seconds"),
        ),
        "loss": ("Loss over compute", _panels(compared, loss, [*compared.curves], _losses)),
        "growth": ("Savings over compute", _panels(compared, saved, compared.variants, _etas)),
        "method": ("How it is measured", tag("p", escape(METHOD), class_="prose")),
        "runs": ("The runs", _runs(compared) + facts(about, label="about the runs")),
        "reproduce": ("Run it again", again),
    }
    return document("Savings", _lead(compared), _tiles(compared), chapters, style=style())


def eta_words(saving: Saving) -> str:
    """1.5x, above 1.9x, or a dash, as HTML."""
    if not math.isfinite(saving.value):
        return DASH
    return f"{saving.bound} {number(saving.value)}&#215;".strip()


def _lead(compared: Comparison) -> str:
    if not compared.variants:
        return "The dense runs come first; no variant is done yet."
    savings = {name: compared.saving(name, ALL, "flops") for name in compared.variants}
    best = max(savings, key=lambda name: np.nan_to_num(savings[name].value))
    seeds = len(compared.curves[best])
    runs = f"{seeds} seeds" if seeds > 1 else "one seed"
    saves = "saves most" if savings[best].value > 1 else "comes nearest, and none saves"
    return (
        f"Of {len(savings)} variants beside a dense model, {escape(best)} {saves}: over all "
        f"media the dense one needs {eta_words(savings[best])} its compute for the same held-out "
        f"loss ({runs})."
    )


def _tiles(compared: Comparison) -> str:
    tiles = []
    for name in compared.variants:
        flops, seconds = (compared.saving(name, ALL, cost) for cost in ("flops", "seconds"))
        note = tag("span", f"{eta_words(seconds)} in time", class_="tile-unit")
        tiles.append(tile(_chip(compared, name), eta_words(flops), _interval(flops), note))
    return tag("ul", *tiles, class_="tiles") if tiles else ""


def _table(compared: Comparison, cost: str) -> str:
    rows = []
    for name in compared.variants:
        savings = [compared.saving(name, medium, cost) for medium in compared.media]
        cells = [f"{eta_words(each)} {tag('small', _interval(each))}" for each in savings]
        share = percent(compared.relative_cost(name, cost))
        gap = number(compared.gap(name, ALL), 3)
        rows.append([_chip(compared, name), *cells, number(len(compared.curves[name])), share, gap])
    head = ["", *map(escape, compared.media), "seeds", "a step, of a dense one", "causality gap"]
    return table(head, rows, label=f"Savings in {cost}")


def _interval(saving: Saving) -> str:
    known = math.isfinite(saving.low)
    return f"[{number(saving.low)}, {number(saving.high)}]" if known else ""


def _panels(compared: Comparison, text: str, names: list[str], draw: Any) -> str:
    panels = [figure(_title(medium), draw(compared, medium)) for medium in compared.media]
    legend = hue_legend(names, [_hue(compared, name) for name in names])
    return tag("p", text, class_="prose") + legend + tag("div", *panels, class_="panels")


def _losses(compared: Comparison, medium: str) -> str:
    curves = []
    for name, runs in compared.curves.items():
        nats = np.stack([run.nats[medium] for run in runs])
        flops = np.mean([run.costs["flops"] for run in runs], axis=0)
        low, high = (nats.min(0), nats.max(0)) if len(runs) > 1 else (None, None)
        curves.append(Curve(name, _hue(compared, name), flops, nats.mean(0), low=low, high=high))
    return line_panel(medium, curves, _frame("nats"))


def _etas(compared: Comparison, medium: str) -> str:
    curves = []
    for name in compared.variants:
        runs = compared.curves[name]
        flops = np.mean([run.costs["flops"] for run in runs], axis=0)
        etas = [compared.saving(name, medium, "flops", place) for place in range(len(flops))]
        known = np.array([not each.bound for each in etas])
        values = np.array([each.value for each in etas])
        curves.append(Curve(name, _hue(compared, name), flops[known], values[known]))
    return line_panel(medium, curves, _frame("times"), reference=1.0)


def _frame(unit: str) -> Frame:
    return Frame(last=0, low=0, high=0, x_unit="FLOPs", y_unit=unit, log_x=True, left=46)


def _runs(compared: Comparison) -> str:
    rows = []
    for name, runs in compared.curves.items():
        for run in runs:
            spent = [compact(run.costs["flops"][-1]), duration(run.costs["seconds"][-1])]
            nats = [number(float(run.nats[medium][-1]), 3) for medium in compared.media]
            rows.append([chip(run.run, _hue(compared, name)), number(int(run.steps[-1])), *spent])
            rows[-1] += nats
    head = ["", "steps", "FLOPs", "time", *(escape(f"{m}, nats") for m in compared.media)]
    return table(head, rows, label="Runs")


def _title(medium: str) -> str:
    return chip(medium) if medium != ALL else chip("all media")


def _chip(compared: Comparison, name: str) -> str:
    return chip(name, _hue(compared, name))


def _hue(compared: Comparison, name: str) -> str:
    """The dense model has no colour of its own."""
    return "c-other" if name == DENSE else run_hue(compared.variants.index(name))
