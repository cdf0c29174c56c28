"""The shell of a verb: the parser made from its signature, its result as text or JSON, colours."""

import argparse
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

STYLES = {"bold": "1", "red": "1;31"}


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in one line that names the nearest option, and coloured help."""

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The options by name; ends with status 2 where they cannot be read."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in arguments:
            option = word.partition("=")[0]
            if option == "--":
                break
            if option.startswith("--") and not any(each.startswith(option) for each in known):
                near = difflib.get_close_matches(option, known, n=1)
                hint = f", did you mean {near[0]}?" if near else ""
                self.error(f"unknown option {option}{hint}")
        return vars(self.parse_intermixed_args(arguments))

    def error(self, message: str) -> NoReturn:
        """One line, and status 2."""
        name = paint(f"{self.prog}:", "red", sys.stderr)
        self.exit(2, f"{name} {message}; {self.prog} --help shows what there is\n")

    def format_help(self) -> str:
        """The help, with headings and examples in colour where a person reads it."""
        headings = r"^(usage|positional arguments|options|examples):"
        bold = functools.partial(paint, style="bold", stream=sys.stdout)
        return re.sub(headings, lambda found: bold(found[0]), super().format_help(), flags=re.M)


def build_parser(prog: str, verb: Callable[..., Any], summary: str, examples: str = "") -> "Parser":
    """The parser of a verb; examples: arguments, one example on each line."""
    lines = [f"  {prog} {line}".rstrip() for line in examples.split("\n")]
    parser = Parser(
        prog=prog,
        description=inspect.getdoc(verb) or summary,
        epilog="\n".join(["examples:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(verb)
    for parameter in inspect.signature(verb).parameters.values():
        _add_argument(parser, parameter, hints[parameter.name])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def call(verb: Callable[..., Any], options: dict[str, Any]) -> Any:
    """What the verb returns for the options that its parser read."""
    positional, keyword = [], {}
    for parameter in inspect.signature(verb).parameters.values():
        value = options[parameter.name]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keyword[parameter.name] = value
        else:
            positional.append(value)
    return verb(*positional, **keyword)


def render(result: Any, indent: str = "") -> str:
    """Nested dicts and lists as indented lines; a result of another kind says itself what it is."""
    if type(result) is not dict:
        return str(result)
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", render(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{indent}{key}:"]
            lines += [
                re.sub(r"^(\s*)  ", r"\1- ", render(row, indent + "  "), count=1) for row in value
            ]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(line for line in lines if line)


def to_json(result: Any) -> str:
    """Strict JSON on one line: a number that is not finite is null."""
    try:
        return json.dumps(result, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(result), allow_nan=False)


def paint(text: str, style: str, stream: TextIO) -> str:
    """`text` in one of STYLES where `stream` is a terminal that shows it; see no-color.org."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\033[{STYLES[style]}m{text}\033[0m"


def _add_argument(parser: argparse.ArgumentParser, parameter: inspect.Parameter, hint: Any) -> None:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        *_, hint = (arg for arg in typing.get_args(hint) if arg is not type(None))  # str | Path
    required = parameter.default is inspect.Parameter.empty
    many = typing.get_origin(hint) in (list, tuple, Sequence)
    kind = typing.get_args(hint)[0] if many else hint
    options: dict[str, Any] = {}
    if typing.get_origin(kind) is typing.Literal:
        options["choices"], kind = typing.get_args(kind), str
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "required": required}
            options["metavar"] = (
                None if "choices" in options else parameter.name.rstrip("_").upper()
            )
            if many:
                options["nargs"] = "+"
        if not required:
            options["default"] = parameter.default
            if parameter.default not in (None, (), "") and kind is not bool:
                options["help"] = f"default: {parameter.default}"
        flag = parameter.name.rstrip("_").replace("_", "-")  # from_ is --from
        parser.add_argument(f"--{flag}", dest=parameter.name, **options)
        return
    if many:
        options["nargs"] = "+" if required else "*"
    elif not required:
        options |= {"nargs": "?", "help": f"default: {parameter.default}"}
    if not required:
        options["default"] = parameter.default
    parser.add_argument(parameter.name, type=kind, metavar=parameter.name.upper(), **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
