"""Parts of a whole as inline SVG: expert loads, bars on one scale, what the stream is made of."""

from collections.abc import Mapping

import numpy as np

from mmpt.page.markup import chip, hue, percent, tag

HEAT_WIDTH, HEAT_HEIGHT, HEAT_LEFT, HEAT_TOP = 50, 30, 24, 18  # of heat maps, in pixels


def heat_map(name: str, loads: np.ndarray, colour: str) -> str:
    """loads: (layers, experts) ids; a cell is the expert's share of its layer's ids.

    Full colour is twice the even share, so a balanced group is evenly half-coloured.
    """
    num_layers, num_experts = loads.shape
    shares = loads / np.maximum(loads.sum(1, keepdims=True), 1)
    columns = [
        tag("text", str(expert + 1), x=HEAT_LEFT + (expert + 0.5) * HEAT_WIDTH, y=11, class_="tick")
        for expert in range(num_experts)
    ]
    rows = [
        tag(
            "text",
            str(layer + 1),
            x=HEAT_LEFT - 8,
            y=HEAT_TOP + layer * HEAT_HEIGHT + 18,
            class_="tick end",
        )
        for layer in range(num_layers)
    ]
    cells = [
        _heat_cell(layer, expert, float(shares[layer, expert]), num_experts)
        for layer in range(num_layers)
        for expert in range(num_experts)
    ]
    width = HEAT_LEFT + num_experts * HEAT_WIDTH
    height = HEAT_TOP + num_layers * HEAT_HEIGHT
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


def stacked_bar(counts: Mapping[str, float]) -> str:
    """What a whole is made of, as one bar with its legend below."""
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
                class_=f"fill {hue(name)}",
            )
        )
        at += count
    legend = [tag("li", chip(name), " ", percent(count / total)) for name, count in counts.items()]
    words = ", ".join(f"{name} {percent(count / total)}" for name, count in counts.items())
    picture = tag("svg", *drawn, height=16, role="img", aria_label=words, class_="stack")
    return picture + tag("ul", *legend, class_="legend")


def _heat_cell(layer: int, expert: int, share: float, num_experts: int) -> str:
    strength = min(share * num_experts / 2, 1.0)
    x, y = HEAT_LEFT + expert * HEAT_WIDTH, HEAT_TOP + layer * HEAT_HEIGHT
    box = {"x": x, "y": y, "width": HEAT_WIDTH - 3, "height": HEAT_HEIGHT - 3, "rx": 4}
    return tag(
        "g",
        tag("title", f"layer {layer + 1}, expert {expert + 1}: {100 * share:.1f}%"),
        tag("rect", **box, class_="floor"),
        tag("rect", **box, class_="fill", fill_opacity=f"{0.65 * strength:.3f}"),
        tag("text", percent(share), x=x + HEAT_WIDTH / 2 - 1.5, y=y + 18),
        class_="strong" if strength > 0.82 else None,
    )
