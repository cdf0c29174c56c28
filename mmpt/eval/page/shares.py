"""Parts of a whole as inline SVG: expert loads, bars on one scale, what the stream is made of."""

from collections.abc import Mapping

import numpy as np

from mmpt.page.markup import chip, hue, percent, tag

HEAT_WIDTH, HEAT_HEIGHT, HEAT_LEFT, HEAT_TOP = 50, 30, 24, 18  # of heat maps, in pixels
DENSE = 12  # experts from which on cells are small and say their share to the pointer only


def heat_map(name: str, loads: np.ndarray, colour: str) -> str:
    """loads: (layers, experts) ids; a cell is the expert's share of its layer's ids.

    Full colour is twice the even share, so a balanced group is evenly half-coloured.
    """
    num_layers, num_experts = loads.shape
    shares = loads / np.maximum(loads.sum(1, keepdims=True), 1)
    dense = num_experts > DENSE
    cell_width, cell_height = (11, 11) if dense else (HEAT_WIDTH, HEAT_HEIGHT)
    columns = [
        tag("text", str(expert + 1), x=HEAT_LEFT + (expert + 0.5) * cell_width, y=11, class_="tick")
        for expert in range(0, num_experts, 8 if dense else 1)
    ]
    rows = [
        tag(
            "text",
            str(layer + 1),
            x=HEAT_LEFT - 8,
            y=HEAT_TOP + (layer + 0.6) * cell_height,
            class_="tick end",
        )
        for layer in range(0, num_layers, 4 if dense else 1)
    ]
    cells = [
        _heat_cell(layer, expert, float(shares[layer, expert]), num_experts)
        for layer in range(num_layers)
        for expert in range(num_experts)
    ]
    width = HEAT_LEFT + num_experts * cell_width
    height = HEAT_TOP + num_layers * cell_height
    spread = f"{100 * shares.min():.0f}% to {100 * shares.max():.0f}%"
    return tag(
        "svg",
        *columns,
        *rows,
        *cells,
        width=width,
        height=height,
        role="img",
        aria_label=f"{name}: an expert takes {spread} of its layer's ids",
        class_=f"heat-map {hue(colour)}",
    )


def bar(share: float, name: str = "") -> str:
    """A horizontal bar of a share of the full width."""
    width = f"{100 * min(max(share, 0.0), 1.0):.2f}%"
    return tag(
        "svg",
        tag("rect", x=0, y=0, width="100%", height=10, rx=5, class_="track"),
        tag("rect", x=0, y=0, width=width, height=10, rx=min(5, 600 * share), class_="fill"),
        height=10,
        aria_hidden="true",
        class_=f"bar {hue(name)}",
    )


def stacked_bar(counts: Mapping[str, float], hues: Mapping[str, str] | None = None) -> str:
    """What a whole is made of, as one bar with its legend below.

    hues: the colours' classes, where the parts are no media.
    """
    hues = hues or {name: hue(name) for name in counts}
    total = sum(counts.values()) or 1.0
    drawn, at = [], 0.0
    for name, count in counts.items():
        drawn.append(
            tag(
                "rect",
                x=f"{100 * at / total:.2f}%",
                y=0,
                width=f"{100 * count / total:.2f}%",
                height=16,
                class_=f"fill {hues[name]}",
            )
        )
        at += count
    legend = [
        tag("li", chip(name, hues[name]), " ", percent(count / total))
        for name, count in counts.items()
    ]
    words = ", ".join(f"{name} {percent(count / total)}" for name, count in counts.items())
    picture = tag("svg", *drawn, height=16, role="img", aria_label=words, class_="stack")
    return picture + tag("ul", *legend, class_="legend")


def _heat_cell(layer: int, expert: int, share: float, num_experts: int) -> str:
    strength = min(share * num_experts / 2, 1.0)
    title = tag("title", f"layer {layer + 1}, expert {expert + 1}: {100 * share:.1f}%")
    if num_experts > DENSE:  # many: no words, and as few bytes as can be
        x, y = HEAT_LEFT + expert * 11, HEAT_TOP + layer * 11
        box = {"x": x, "y": y, "width": 10, "height": 10, "class_": "fill"}
        return tag("rect", title, **box, fill_opacity=f"{0.04 + 0.9 * strength:.2f}")
    x, y = HEAT_LEFT + expert * HEAT_WIDTH, HEAT_TOP + layer * HEAT_HEIGHT
    box = {"x": x, "y": y, "width": HEAT_WIDTH - 3, "height": HEAT_HEIGHT - 3, "rx": 4}
    return tag(
        "g",
        title,
        tag("rect", **box, class_="floor"),
        tag("rect", **box, class_="fill", fill_opacity=f"{0.65 * strength:.3f}"),
        tag("text", percent(share), x=x + HEAT_WIDTH / 2 - 1.5, y=y + 18),
        class_="strong" if strength > 0.82 else None,
    )
