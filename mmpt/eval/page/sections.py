"""The measured parts of the report: likelihood, losses, expert loads, codecs and stages as HTML.

A section takes plain values as other modules record them, and is empty when it has none. Where the
model is not better than what it is compared with, the words say so.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mmpt.eval.page import plots, shares
from mmpt.eval.page.plots import Likelihood, Reference
from mmpt.eval.page.verdicts import Row, beats, bounds, plain_words, ratio, verdict
from mmpt.page.markup import (
    DASH,
    MODALITIES,
    chip,
    duration,
    escape,
    finite,
    number,
    percent,
    plain,
    table,
    tag,
    words,
)

LOAD_STEPS = 20  # the last steps whose expert loads are summed
GROUPS = {"visual": ("image", "video"), "all": MODALITIES}  # groups that serve several modalities
# of a codec's report card: key -> (name, unit, whether more is better)
QUALITY = {
    "psnr": ("PSNR", "dB", True),
    "wer_unseen": ("word error, unseen voices", "", False),
    "log_mel_distance": ("log-mel distance", "nats", False),
    "bytes_per_id": ("bytes per id", "", True),
}
SHARES = ("usage", "exact", "identity", "wer_seen", "wer_unseen")  # shown as per cent
# of a report card, what else a reader wants to see
MORE = ("wer_seen", "ssim", "log_mel_distance", "stoi", "bits_per_pixel", "bits_per_second")
MORE += ("exact", "usage", "perplexity", "identity")
KEY = tag(
    "ul",
    tag("li", tag("i", class_="key-ours"), "this model"),
    tag("li", tag("i", class_="key-shuffled"), "this model, given another document's condition"),
    tag("li", tag("i", class_="key-baseline"), "baseline"),
    class_="legend",
)


def heldout(measured: Mapping[str, Row]) -> str:
    """Nats per id beside unigram, baseline and the wrong condition: charts, sentences, table."""
    rows = {name: row for name, row in measured.items() if isinstance(row, Mapping) and row}
    if not rows:
        return ""
    ordered = sorted(rows, key=lambda name: MODALITIES.index(name) if name in MODALITIES else 9)
    rows = {name: rows[name] for name in ordered}
    intro = (
        "Nats per id on held-out documents: how surprised the model is by each id, on average. "
        "Less is better. The unigram knows only how often each id occurs; 100% is as good as that."
    )
    chart = plots.likelihood_chart(
        [
            Likelihood(
                name=name,
                ours=finite(row.get("nats")),
                unigram=finite(row.get("unigram_nats")),
                baseline=finite(row.get("baseline_nats")),
                shuffled=_shuffled(row),
            )
            for name, row in rows.items()
        ]
    )
    return (
        tag("p", intro, class_="prose")
        + _figure(chart, KEY, "Share of the unigram's nats; less is better")
        + tag("ul", *(plain_words(name, row) for name, row in rows.items()), class_="sentences")
        + _condition(rows)
        + _heldout_table(rows)
    )


def _shuffled(row: Row) -> float | None:
    """Nats under another condition; shifted from all documents where only some have a condition."""
    ours, shuffled = finite(row.get("nats")), finite(row.get("shuffled_nats"))
    conditioned = finite(row.get("conditioned_nats"))
    if ours is None or shuffled is None or conditioned is None:
        return shuffled
    return ours + shuffled - conditioned


def _figure(chart: str, legend: str, caption: str) -> str:
    return tag("figure", tag("figcaption", caption), legend, chart, class_="chart")


def _condition(rows: Mapping[str, Row]) -> str:
    known = {name: each for name, row in rows.items() if (each := bounds(row))}
    if not known:
        return ""
    text = (
        "Does it read its condition? Nats that another document's condition costs; above 0 it does"
    )
    legend = tag("p", "Dots are means, bars their intervals, over documents with a condition.")
    return _figure(plots.interval_chart(known), legend, text)


def _heldout_table(rows: Mapping[str, Row]) -> str:
    head = (
        "",
        "ids",
        "ours",
        "unigram",
        "baseline",
        "ours / unigram",
        "right condition",
        "another one",
        "its cost",
        "against baseline",
    )
    body = []
    for name, row in rows.items():
        known = row.get("baseline")
        under = tag("small", escape(known)) if known else ""
        body.append(
            (
                chip(name),
                number(row.get("tokens")),
                tag("b", number(row.get("nats"), 3)),
                number(row.get("unigram_nats"), 3),
                f"{number(row.get('baseline_nats'), 3)} {under}",
                number(ratio(row.get("nats"), row.get("unigram_nats")), 3),
                number(row.get("conditioned_nats"), 3),
                number(row.get("shuffled_nats"), 3),
                _cost_of_condition(bounds(row)),
                verdict(beats(row, "baseline_nats"), yes="better", no="not better"),
            )
        )
    return table(head, body, label="Held-out nats per id, exactly", class_="ids")


def _cost_of_condition(interval: tuple[float, float, float] | None) -> str:
    if interval is None:
        return DASH
    low, mean, high = interval
    return f"{number(mean, 3)} " + tag("small", f"[{number(low, 3)}, {number(high, 3)}]")


def curves(rows: Mapping[str, Sequence[Row]], measured: Mapping[str, Row]) -> str:
    """Loss per modality over the steps of every phase; baselines where they are comparable."""
    return "".join(
        _phase(name, phase, measured if name == "pretraining" else {})
        for name, phase in rows.items()
        if phase
    )


def _phase(name: str, rows: Sequence[Row], measured: Mapping[str, Row]) -> str:
    panels = []
    for modality in MODALITIES:
        points = _points(rows, modality)
        if len(points) < 2:
            continue
        chart = plots.loss_panel(modality, points, _references(measured.get(modality) or {}))
        panels.append(tag("figure", tag("figcaption", chip(modality)), chart, class_="chart"))
    if not panels:
        return ""
    text = (
        f"Nats per id over {number(len(rows))} steps: every step faint, their moving mean strong."
    )
    if measured:
        text += " Dashed: what unigram and baseline reach on held-out documents."
    skipped = max((finite(row.get("bad_steps")) or 0 for row in rows), default=0)
    if skipped:
        text += f" Steps skipped because a value was not finite: {skipped:,.0f}."
    return (
        tag("h3", escape(words(name)))
        + tag("p", text, class_="prose")
        + tag("div", *panels, class_="panels")
    )


def _points(rows: Sequence[Row], modality: str) -> list[tuple[float, float, float]]:
    points = []
    for index, row in enumerate(rows, 1):
        values = (row.get("modality") or {}).get(modality) or {}
        loss = finite(values.get("loss"))
        if loss is not None:
            step = finite(row.get("step")) or index
            points.append((step, loss, finite(values.get("tokens")) or 1.0))
    return points


def _references(row: Row) -> list[Reference]:
    named = {"unigram": row.get("unigram_nats"), "baseline": row.get("baseline_nats")}
    return [
        Reference(name=name, value=known)
        for name, value in named.items()
        if (known := finite(value)) is not None
    ]


def experts(rows: Mapping[str, Sequence[Row]]) -> str:
    """What the stream was made of, and the share of every expert in every layer's ids."""
    out = []
    for name, phase in rows.items():
        counts = _ids_by_modality(phase)
        maps = [_heat(group, loads) for group, loads in _loads(phase).items()]
        if not counts and not maps:
            continue
        caption = "Ids that the loss counted, by modality"
        bar = tag("figure", tag("figcaption", caption), shares.stacked_bar(counts), class_="chart")
        heat = tag("div", *maps, class_="heat-maps")
        title = tag("h3", escape(words(name)))
        out.append(tag("div", title, bar if counts else "", heat if maps else ""))
    text = (
        "Each group of experts has its modalities. Rows are layers, columns are experts; a cell is "
        f"the expert's share of its layer's ids in the last {LOAD_STEPS} steps. Half colour is an "
        "even share, full colour twice that; no colour is an expert that does nothing."
    )
    return tag("p", text, class_="prose") + tag("div", *out, class_="panels") if out else ""


def _ids_by_modality(rows: Sequence[Row]) -> dict[str, float]:
    counts = dict.fromkeys(MODALITIES, 0.0)
    for row in rows:
        for name, values in (row.get("modality") or {}).items():
            counts[name] = counts.get(name, 0.0) + (finite((values or {}).get("tokens")) or 0.0)
    return {name: count for name, count in counts.items() if count}


def _loads(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Per group (layers, experts): ids in the last steps; groups that saw none are left out."""
    sums: dict[str, np.ndarray] = {}
    for row in list(rows)[-LOAD_STEPS:]:
        for group, loads in (row.get("load") or {}).items():
            array = np.nan_to_num(np.array(loads, dtype=float))
            if array.ndim == 2 and array.size:
                same = group in sums and sums[group].shape == array.shape
                sums[group] = sums[group] + array if same else array
    return {group: array for group, array in sums.items() if array.any()}


def _heat(group: str, loads: np.ndarray) -> str:
    clean = group.removeprefix("noisy_")
    served = GROUPS.get(clean, (clean,))
    detail = "ids being denoised" if clean != group else "committed ids"
    chips = "".join(chip(name) for name in served)
    chart = tag(
        "div",
        shares.heat_map(group, loads, served[0]),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=f"Expert load of {group}",
    )
    return tag(
        "figure", tag("figcaption", tag("div", chips), tag("small", detail)), chart, class_="heat"
    )


def codecs(rows: Sequence[Row]) -> str:
    """Quality on held-out media beside a baseline of as many codes and bits."""
    if not rows:
        return ""
    text = (
        "Each codec turns a medium into codes and back; what it loses, the model never sees. "
        "The baseline spends as many codes and bits (bytes for text, k-means for the rest)."
    )
    head = ("", "codec", "codes", "rate", "quality, held out", "baseline", "verdict", "more")
    return tag("p", text, class_="prose") + table(
        head, [_codec(row) for row in rows], label="Codecs beside their baselines", class_="codecs"
    )


def _codec(row: Row) -> tuple[str, ...]:
    ours, baseline = row.get("heldout") or {}, row.get("baseline") or {}
    key = next((key for key in QUALITY if key in ours), None)
    name, unit, more_is_better = QUALITY.get(key or "", ("", "", True))
    mine, theirs = finite(ours.get(key)), finite(baseline.get(key))
    won = (
        None
        if mine is None or theirs is None
        else (mine > theirs) == more_is_better and mine != theirs
    )
    fingerprint = str(row.get("fingerprint") or "")
    more = [
        f"{escape(words(k))} {percent(v) if k in SHARES else plain(v)}"
        for k, v in ours.items()
        if k in MORE and k != key and v is not None
    ]
    show = percent if key in SHARES else number
    return (
        chip(str(row.get("modality") or "")),
        tag("b", escape(row.get("name") or ""))
        + tag("small", escape(fingerprint[:12]), title=fingerprint),
        number(row.get("codebook_size")),
        plain(row.get("rate")),
        f"<b>{show(mine)}</b> {unit}" + tag("small", name),
        f"{show(theirs)} {unit}",
        verdict(won, yes="better", no="not better"),
        tag("small", " &#183; ".join(more)),
    )


def stages(rows: Sequence[tuple[str, float | None, str]]) -> str:
    """(name, seconds, detail) of every stage, as bars on one scale."""
    longest = max((seconds or 0.0 for _, seconds, _ in rows), default=0.0) or 1.0
    items = [
        tag(
            "li",
            tag("span", escape(name), class_="stage-name"),
            tag("span", duration(seconds), class_="stage-time"),
            shares.bar((seconds or 0.0) / longest),
            tag("small", escape(detail)),
        )
        for name, seconds, detail in rows
    ]
    return tag("ol", *items, class_="stages")
