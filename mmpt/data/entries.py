"""What the part list of a document says beside the parts themselves: who says them, and when."""

from typing import Any

from mmpt.config import UserError
from mmpt.vocab import ROLES

MAX_TIME = 1e7  # seconds of one document


def load_roles(entries: list[dict[str, Any]], order: str) -> tuple[str, ...]:
    """Who says each part of a conversation; empty where the document is none."""
    if not any("role" in entry for entry in entries):
        return ()
    roles: list[Any] = [entry.get("role") for entry in entries]
    for role in roles:
        if role not in ROLES:
            raise UserError(f"bad role: of every part it is user or assistant, not {role!r:.99}")
    if order != "fixed":
        raise UserError("bad role: turns keep their order; say order fixed")
    return tuple(roles)


def load_times(entries: list[dict[str, Any]]) -> tuple[tuple[float, float] | None, ...]:
    """When each part begins and ends, in seconds; empty where nothing says it."""
    times = tuple(_load_time(entry.get("start"), entry.get("end")) for entry in entries)
    return times if any(times) else ()


def _load_time(start: Any, end: Any) -> tuple[float, float] | None:
    if start is None and end is None:
        return None
    begin, stop = _seconds(start), _seconds(end)
    if stop < begin:
        raise UserError(f"bad json: a part ends at {end} s, before it starts at {start} s")
    return begin, stop


def _seconds(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value <= MAX_TIME:
        raise UserError(f"bad json: a time is seconds from 0 to {MAX_TIME:.0e}, not {value!r:.99}")
    return float(value)
