"""One stream of ids as a page: a ribbon, codes over what they decode to, likelihood, experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.eval.page import shares
from mmpt.eval.page.grids import expert_strips, span_figures
from mmpt.eval.routes import Routes
from mmpt.page.cells import render_cell
from mmpt.page.curves import Curve, line_panel
from mmpt.page.document import document, tile
from mmpt.page.frame import Frame
from mmpt.page.markup import MODALITIES, chip, escape, facts, hue, number, table, tag
from mmpt.parts import Part
from mmpt.processor import Processor
from mmpt.stream import Stream

KINDS = (*MODALITIES, "structure")
MAX_NATS = 8.0  # of a full colour
MANY = 4096  # ids of a ribbon; the rest is left out


@dataclass(frozen=True)
class Look:
    """What is shown. kinds, names: of each id, for people. about: nested plain values."""

    stream: Stream
    routes: Routes
    kinds: Sequence[str]
    names: Sequence[str]
    parts: Sequence[Part]
    about: Mapping[str, Any]


def render(look: Look, processor: Processor, title: str) -> str:
    """The page as HTML."""
    counts = {kind: look.kinds.count(kind) for kind in KINDS if kind in look.kinds}
    total = len(look.kinds)
    tiles = [tile("ids", number(total), "in the stream")]
    tiles += [tile(kind, number(count), "ids") for kind, count in counts.items()]
    cells = [render_cell(part, "", f"part {n}") for n, part in enumerate(look.parts, 1)]
    chapters = {
        "stream": ("The stream", tag("div", *cells, class_="cells card") + _ribbon(look)),
        "codes": ("Codes", span_figures(look.stream, look.routes.nats, processor) or NO_MEDIA),
        "likelihood": ("Likelihood", _likelihood(look)),
        "experts": ("Experts", _experts(look)),
        "record": ("Record", facts(look.about, label="record")),
    }
    lead = (
        "What was given and what was made, as the model reads it: one stream of ids. Everything "
        "below is of one pass of the autoregressive model over it."
    )
    return document(
        title,
        lead,
        tag("ul", *tiles, class_="tiles"),
        chapters,
        style=Path(__file__).with_name("stream.css").read_text("utf-8"),
    )


NO_MEDIA = tag("p", "This stream is text alone.", class_="prose")


def _ribbon(look: Look) -> str:
    cells = []
    rows = zip(look.kinds, look.names, look.routes.nats.tolist(), strict=True)
    for place, (kind, name, nats) in enumerate(rows):
        if place == MANY:
            break
        known = f", {nats:.2f} nats" if place else ""
        share = min(nats / MAX_NATS, 1.0)
        title = f"{place}: {name!r}{known}" if kind == "text" else f"{place}: {name}{known}"
        cells.append(tag("i", class_=hue(kind), style=f"--n:{share:.2f}", title=title))
    legend = [tag("li", chip(kind)) for kind in KINDS if kind in look.kinds]
    more = f" The first {MANY:,} of {len(look.kinds):,} are shown." if place == MANY else ""
    text = (
        "Every id in its colour, in reading order. The fuller a cell, the less the model expected "
        f"the id: {MAX_NATS:.0f} nats fill it. Point at one to read it.{more}"
    )
    words = f"{len(cells)} ids: " + ", ".join(sorted(set(look.kinds)))
    return (
        tag("p", text, class_="prose", style="margin-top:28px")
        + tag("ul", *legend, class_="legend")
        + tag("div", *cells, class_="ribbon", role="img", aria_label=words)
    )


def _likelihood(look: Look) -> str:
    nats, kinds = look.routes.nats, np.array(look.kinds)
    after = np.arange(len(nats)) > 0  # nothing comes before the first
    rows, curves = [], []
    for kind in KINDS:
        here = np.flatnonzero((kinds == kind) & after)
        if not len(here):
            continue
        mean = float(nats[here].mean())
        most = int(here[nats[here].argmax()])
        where = tag("small", f"at {most}, {number(float(nats[most]))} nats")
        perplexity = number(float(np.exp(min(mean, 50.0))), 1)
        rows.append(
            [
                chip(kind),
                number(len(here)),
                number(mean, 3),
                perplexity,
                escape(look.names[most]) + where,
            ]
        )
        runs = np.split(here, np.flatnonzero(np.diff(here) > 1) + 1)
        curves += [Curve(kind, hue(kind), run.astype(float), nats[run]) for run in runs]
    head = ["", "ids", "nats each", "perplexity", "least expected"]
    frame = Frame(last=0, low=0, high=0, x_unit="position", y_unit="nats", width=800)
    panel = tag(
        "figure",
        line_panel("nats of each id", curves[: MANY // 8], frame, values=0),
        class_="chart",
    )
    return table(head, rows, label="Likelihood by medium") + panel + _tokens(look)


def _tokens(look: Look) -> str:
    words = []
    for place, (kind, name) in enumerate(zip(look.kinds, look.names, strict=True)):
        if kind == "text":
            nats = float(look.routes.nats[place])
            title = f"{place}: {nats:.2f} nats"
            style = f"--n:{min(nats / MAX_NATS, 1):.2f}"
            words.append(tag("span", escape(name), style=style, title=title))
        elif words and words[-1] != " ":
            words.append(" ")
    if not words:
        return ""
    return tag("h3", "Text, by how little it was expected", class_="kind") + tag(
        "p", *words, class_="tokens c-text"
    )


def _experts(look: Look) -> str:
    kinds, out = np.array(look.kinds), []
    for name, used in look.routes.experts.items():
        if used.shape[2] == 1:
            continue
        for kind in KINDS:
            loads = used[:, kinds == kind].sum(1)  # (layers, experts)
            if not loads.any():
                continue
            chart = shares.heat_map(f"{name}, {kind}", loads, kind)
            about = tag("small", f"group {escape(name)}, {number(int((kinds == kind).sum()))} ids")
            out.append(
                tag(
                    "figure",
                    tag("figcaption", tag("div", chip(kind)), about),
                    tag("div", chart, class_="scroll", tabindex=0, role="region", aria_label=kind),
                    class_="heat",
                )
            )
    if not out:
        text = "Each group of this model has one expert, which sees all ids of its media."
        return tag("p", text, class_="prose") + expert_strips(look.routes.experts, look.kinds)
    text = (
        "Rows are layers, columns are the experts of a group; a cell is the share of the ids of a "
        "medium that the expert saw. Half colour is an even share."
    )
    strips = expert_strips(look.routes.experts, look.kinds)
    return tag("p", text, class_="prose") + tag("div", *out, class_="heat-maps") + strips
