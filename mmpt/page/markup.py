"""HTML from plain values: elements with escaped attributes, numbers, and nested dicts as tables.

Everything that a person or a model wrote passes through `escape`, so `<boi>` stays four characters
between two brackets. A value that is missing or not finite is a dash, never "nan".
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

DASH = "&#8212;"
MINUS = "&#8722;"
MODALITIES = ("text", "image", "video", "speech")
VOID = {"img", "source", "br", "input"}
# control characters as their pictures: an HTML parser would drop or refuse them
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def escape(text: object) -> str:
    """Text as it must stand in HTML, in an element or in a quoted attribute."""
    shown = str(text).replace("\r\n", "\n").translate(CONTROLS)
    return html.escape(shown.encode("utf-8", "replace").decode(), quote=True)


def tag(name: str, /, *children: str, **attributes: object) -> str:
    """An element around finished HTML; `class_` is class, `stroke_width` is stroke-width."""
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return opening if name in VOID else f"{opening}{''.join(children)}</{name}>"


def finite(value: object) -> float | None:
    """The value as a float; None for what is missing, no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: object, digits: int = 2) -> str:
    """A number with thousands separators and a true minus sign, or a dash."""
    known = finite(value)
    if known is None:
        return DASH
    text = f"{value:,}" if isinstance(value, int) else f"{known:,.{digits}f}"
    return text.replace("-", MINUS)


def percent(share: object) -> str:
    """0.43 -> 43%; small shares keep one digit."""
    known = finite(share)
    if known is None:
        return DASH
    return f"{100 * known:.{1 if 0 < known < 0.0995 else 0}f}%"


def duration(seconds: object) -> str:
    """492 -> 8 min 12 s."""
    known = finite(seconds)
    if known is None:
        return DASH
    if known < 10:
        return f"{known:.1f} s"
    whole = round(known)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def words(key: object) -> str:
    """A key of a dict as words: bad_samples -> bad samples."""
    return str(key).replace("_", " ")


def hue(name: str) -> str:
    """The class that gives an element the colour of a modality, or a neutral one."""
    return f"c-{name}" if name in MODALITIES else "c-other"


def chip(name: str, colour: str = "") -> str:
    """A name behind a dot of a colour: that of the modality, unless a class gives another one."""
    return tag("span", tag("i"), escape(name), class_=f"chip {colour or hue(name)}")


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, label: str, class_: str = ""
) -> str:
    """A table of finished cells, the first of each row its header; a wide one scrolls."""
    header = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    inner = tag("table", tag("thead", header), tag("tbody", *body), class_=class_ or None)
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def facts(values: Mapping[str, Any], *, label: str) -> str:
    """A nested dict: its plain values as a list, each table of equal dicts as a table."""
    plain = {key: value for key, value in values.items() if not _is_nested(value)}
    out = [_definitions(plain)] if plain else []
    for key, value in values.items():
        if _is_nested(value):
            name = f"{label}: {words(key)}"
            out += [tag("h3", escape(words(key))), _nested(value, label=name)]
    return "".join(out)


def plain(value: Any) -> str:
    """One value that is no dict, or a list of such values, as HTML."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value) or abs(value) < 1e-3:
            return number(value, 0) if not value or not math.isfinite(value) else f"{value:.3g}"
        return number(value, 3).rstrip("0").rstrip(".")
    if isinstance(value, int):
        return number(value)
    if value is None or value == "" or value == [] or value == ():
        return DASH
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(words(key))} {plain(item)}" for key, item in value.items())
    return escape(value)


def _is_nested(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping) and bool(value)


def _nested(value: Any, *, label: str) -> str:
    if isinstance(value, Mapping) and not all(isinstance(item, Mapping) for item in value.values()):
        return facts(value, label=label)
    named = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value, 1))
    columns = list(dict.fromkeys(key for _, item in named for key in item))
    rows = [
        [escape(words(name)), *(plain(item.get(key)) for key in columns)] for name, item in named
    ]
    return table(["", *(escape(words(key)) for key in columns)], rows, label=label)


def _definitions(values: Mapping[str, Any]) -> str:
    pairs = [
        tag("div", tag("dt", escape(words(key))), tag("dd", plain(value)))
        for key, value in values.items()
    ]
    return tag("dl", *pairs, class_="facts")
