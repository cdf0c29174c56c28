"""gate.html: what the quality gate says, and samples side by side that nobody picked."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmpt.eval.gate_samples import System
from mmpt.eval.gate_stats import FEWEST
from mmpt.page.cells import render_cell, row_width
from mmpt.page.document import document, tile
from mmpt.page.markup import DASH, MINUS, chip, duration, escape, facts, number, percent, table, tag
from mmpt.parts import Part

Row = Mapping[str, Any]

METHOD = f"""For each held-out prompt every way to decode draws equally many samples, from the same
seeds. The loss is how much worse a candidate is than the reference; its one-sided 95% bounds are
percentiles of 2,000 bootstrap draws, each of the same prompts for both, expanded for few prompts.
A candidate is not inferior where the upper bound lies below the margin, inferior where the lower
bound lies above it; between them, or with fewer than {FEWEST} prompts, the gate cannot tell. A
metric counts only if it can tell good from bad here: the same test must call inferior the
reference's own samples when they are judged beside other prompts, and samples of one pass with the
candidate's settings. Distances between all samples and all real media (kernel, FID, KID) do not
look at prompts, so they are shown, but do not count. Guards need no such control: they say whether
fewer different codes were used, by which a likelihood can be bought. A candidate passes when all
that counts is not inferior.
Margins were fixed in the recipe."""
PLACES = "The first prompts in the order of a hash of their names, and the first sample of each."
REAL = "real, through the codec"
COLOURS = {"not inferior": "good", "inferior": "bad"}


def render_gate(
    result: Mapping[str, Any], shown: Mapping[str, Sequence[System]], num_shown: int
) -> str:
    """The page as HTML. result: of `mmpt eval --compare`; shown: the systems of each medium."""
    media, again = result["media"], tag("p", "The command that makes this page:", class_="prose")
    again += tag("pre", tag("code", escape(result["command"])), tabindex=0)
    again += tag("p", f"Model {escape(result['fingerprint'])}.", class_="prose")
    chapters = {
        "verdicts": ("What the tests say", "".join(_tests(name, media[name]) for name in media)),
        "values": ("What was measured", "".join(_values(name, media[name]) for name in media)),
        "samples": (
            "Side by side",
            tag("p", PLACES, class_="prose")
            + "".join(_samples(name, systems, num_shown) for name, systems in shown.items()),
        ),
        "method": ("How it is judged", tag("p", escape(METHOD), class_="prose")),
        "settings": ("Settings", facts(result["settings"], label="settings")),
        "reproduce": ("Run it again", again + facts(result["environment"], label="environment")),
    }
    return document("Quality gate", _lead(result), _tiles(media), chapters)


def verdict_words(verdict: str) -> str:
    """A verdict in words and a sign, as HTML."""
    sign = {"not inferior": "&#10003; ", "inferior": "&#10007; "}.get(verdict, "")
    return tag("span", f"{sign}{verdict}", class_=f"verdict {COLOURS.get(verdict, '')}".strip())


def _lead(result: Mapping[str, Any]) -> str:
    reference, *others = result["settings"]
    count = sum(each["samples"] for each in result["media"].values())
    return (
        f"Is {escape(' or '.join(others))} as good as {escape(reference)}? {number(count)} samples "
        "by each, for held-out prompts, tested for non-inferiority."
    )


def _tiles(media: Mapping[str, Row]) -> str:
    tiles = []
    for medium, found in media.items():
        for name, verdict in found["verdicts"].items():
            counted = sum(row["counts"] for row in found["metrics"])
            unit = f"{escape(name)}; metrics that count: {counted}"
            size = f"{number(found['prompts'])} prompts, {number(found['samples'])} samples"
            tiles.append(
                tile(
                    chip(medium),
                    verdict_words(verdict),
                    unit,
                    tag("span", size, class_="tile-unit"),
                )
            )
    return tag("ul", *tiles, class_="tiles")


def _tests(medium: str, found: Row) -> str:
    rows = []
    for row in found["metrics"]:
        for name, outcome in row["tests"].items():
            low, high = (_loss(row, outcome[bound]) for bound in ("low", "high"))
            counts = "guard" if row["guard"] else "yes" if row["counts"] else "does not count"
            why = tag("small", escape(row["why_not"])) if row["why_not"] else ""
            between = "" if outcome["low"] is None else tag("small", f"[{low}, {high}]")
            bounds = f"{_loss(row, outcome['loss'])} {between}"
            cells = [bounds, _loss(row, row["margin"]["size"]), verdict_words(outcome["verdict"])]
            rows.append([escape(row["metric"]), escape(name), *cells, f"{counts} {why}".strip()])
    head = ["", "candidate", "loss, with its 95% bounds", "margin", "verdict", "counts"]
    notes = [
        tag("p", f"{escape(name)}: {escape(why)}", class_="note")
        for name, why in found["skipped"].items()
    ]
    return tag("h3", chip(medium)) + table(head, rows, label=f"Tests, {medium}") + "".join(notes)


def _values(medium: str, found: Row) -> str:
    names = list(found["metrics"][0]["values"])
    rows = [
        [
            f"{escape(row['metric'])} {tag('small', escape(row['unit']))}",
            *(number(row["values"][name], 3) for name in names),
        ]
        for row in found["metrics"]
    ]
    seconds = found["seconds_per_sample"]
    rows.append(
        ["time of a sample", *(duration(seconds[n]) if n in seconds else DASH for n in names)]
    )
    head = ["", *(escape(REAL if n == "real" else n) for n in names)]
    return tag("h3", chip(medium)) + table(head, rows, label=f"Values, {medium}")


def _loss(row: Row, value: float | None) -> str:
    """In per cent of the reference's value, in points of a share, or as it is."""
    if value is None:
        return DASH
    if row["margin"]["relative"]:
        return f"{MINUS if value < 0 else ''}{percent(abs(value))}"
    if row["unit"].startswith("share"):
        return f"{number(100 * value, 1)} points"
    return number(value, 3)


def _samples(medium: str, systems: Sequence[System], num_shown: int) -> str:
    columns = ["prompt", *(REAL if s.name == "real" else s.name for s in systems)]
    first = [_first(system, num_shown) for system in systems]
    cards = []
    for place in range(min(num_shown, len(first[0]))):
        prompt = next(a.prompt for a in systems[0].answers if a.place == place)
        words = " / ".join(prompt.texts)
        cells = [words, *(parts[place] for parts in first)]
        figures = [
            render_cell(cell, "" if label == "prompt" else label, words)
            for cell, label in zip(cells, columns, strict=True)
        ]
        cards.append((row_width(cells), tag("div", *figures, class_="cells")))
    wide = min(max([260, *(width for width, _ in cards)]) + 38, 1040)
    articles = [tag("article", card, class_="card") for _, card in cards]
    return tag("h3", chip(medium)) + tag("div", *articles, class_="cards", style=f"--wide:{wide}px")


def _first(system: System, count: int) -> list[Part]:
    """The first sample of each of the first prompts."""
    parts: dict[int, Part] = {}
    for part, answer in zip(system.parts, system.answers, strict=True):
        parts.setdefault(answer.place, part)
    return [parts[place] for place in sorted(parts)[:count]]
