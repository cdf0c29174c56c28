"""Frozen dataclasses <-> TOML recipes, with key=value overrides.

A recipe is a TOML file whose keys are the fields of a dataclass; nested tables are nested
dataclasses. An unknown key is an error that names the nearest known one, so that a misspelt
option never trains a week-long run with its default.
"""

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

T = TypeVar("T")


class UserError(ValueError):
    """A mistake of the user: one line that says what was given, what is needed, what to do."""


def load_recipe(cls: type[T], path: str | Path | None, overrides: Iterable[str] = ()) -> T:
    """Read a TOML recipe into the dataclass `cls`, then apply `key.sub=value` overrides.

    path: None where the overrides say all.
    """
    data = {} if path is None else _read_toml(Path(path))
    for override in overrides:
        set_override(data, override)
    return from_dict(cls, data, where="recipe" if path is None else Path(path).name)


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "config") -> T:
    """Build the dataclass `cls` from plain values; UserError for an unknown or ill-typed key."""
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{_nearest(key, fields)}")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def set_override(data: dict[str, Any], override: str) -> None:
    """Put the value of `key.sub=value` at its place in nested tables; UserError for other texts."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that name=cat works unquoted
    *tables, last = key.split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: {table!r} is not a table")
    data[last] = value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a dataclass, without the fields that are None (TOML has no null)."""
    return _without_none(dataclasses.asdict(config))


def to_toml(config: Any) -> str:
    """The recipe text that `load_recipe` reads back into an equal dataclass."""
    return tomli_w.dumps(to_dict(config))


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file under a temporary name, then rename: readers never see half a file.

    Raises UserError when it cannot be (no permission, a full disk); then nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another place") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; give the path of a .toml file") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _nearest(key: str, known: Iterable[str]) -> str:
    known = list(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        [hint] = [arg for arg in args if arg is not type(None)]
        return _convert(hint, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{where} = {value!r}; choose one of {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a table, not {value!r}")
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        hints = [inner] * len(value) if inner is not None else list(args)
        if len(hints) != len(value):
            raise UserError(f"{where} needs {len(hints)} values, not {len(value)}")
        return tuple(_convert(h, v, where) for h, v in zip(hints, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    plain = origin or hint
    if not isinstance(plain, type) or type(value) is not plain:
        name = getattr(plain, "__name__", plain)
        raise UserError(f"{where} must be {name}, not {value!r}")
    return value
