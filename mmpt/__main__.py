"""The table of command-line verbs.

A verb is a typed function: parameters before the `*` are positional arguments, those after it are
flags, the first paragraph of its docstring is its help, and what it returns is printed (with
`--json`, as JSON on stdout). Only the module of the verb that runs is imported, so that
`mmpt --help` answers at once.
"""

import argparse
import importlib
import inspect
import json
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from mmpt.config import UserError

# verb -> (module:function, one line of help, an example)
VERBS = {
    "quickstart": (
        "mmpt.quickstart:quickstart",
        "run the main job on the embedded sampler",
        "--out runs/quickstart",
    ),
    "doctor": ("mmpt.doctor:doctor", "say what this machine has and what will run where", ""),
    "data list": ("mmpt.data.inspect:list_datasets", "list the data sets that can be prepared", ""),
    "data prepare": (
        "mmpt.data.inspect:prepare",
        "build a data set from its packages",
        "emoji --out build/emoji",
    ),
    "data import": (
        "mmpt.data.formats:import_documents",
        "turn documents of other formats into raw shards",
        "html docs/_build --out build/pages --name pages",
    ),
    "data inspect": ("mmpt.data.inspect:inspect", "count what shards hold", "data/sampler/*.tar"),
    "data index": (
        "mmpt.data.index:index_shards",
        "write down what raw shards hold, so that later damage is counted",
        "data/sampler/*.tar",
    ),
    "data verify": (
        "mmpt.data.verify:verify",
        "find every damaged sample of shards",
        "data/sampler/*.tar",
    ),
    "data interleave": (
        "mmpt.data.interleave:interleave",
        "make documents in which media take turns",
        "data/sampler/voices-*.tar --out build/turns --template speech-text-spans mean_words=3",
    ),
    "data curate": (
        "mmpt.data.curate:curate",
        "leave out bad and repeated documents by filters of a recipe",
        "examples/recipes/curate.toml --out build/curated",
    ),
    "tokenizer list": (
        "mmpt.tokenizers.evaluate:list_tokenizers",
        "list the shipped tokenizers",
        "",
    ),
    "tokenizer train": (
        "mmpt.tokenizers.train:train",
        "train a tokenizer from its recipe",
        "tokenizers/image-f8/recipe.toml --out build/image steps=200",
    ),
    "tokenizer eval": (
        "mmpt.tokenizers.evaluate:evaluate",
        "measure a tokenizer on held-out media",
        "image-f8",
    ),
    "tokenizer roundtrip": (
        "mmpt.tokenizers.evaluate:roundtrip",
        "encode and decode a file of yours",
        "image-f8 cat.png --out cat-decoded.png",
    ),
    "encode": (
        "mmpt.data.encode:encode",
        "turn raw shards into token shards",
        "data/sampler/emoji-train-*.tar --out build/tokens",
    ),
    "init": (
        "mmpt.convert.init:init",
        "make a model of all media out of a text model of others",
        "--from models/olmo --codecs image-f8 speech-12hz --out models/start",
    ),
    "plan": (
        "mmpt.plan:plan",
        "say before a run what its numbers should be",
        "examples/recipes/tiny.toml --gpus 8",
    ),
    "train": (
        "mmpt.train.pretrain:train_command",
        "pretrain a model from a recipe",
        "examples/recipes/tiny.toml --out runs/tiny",
    ),
    "adapt": (
        "mmpt.train.adapt:adapt_command",
        "adapt a model to parallel decoding",
        "examples/recipes/tiny-adapt.toml --out runs/tiny-dida",
    ),
    "upcycle": (
        "mmpt.train.upcycle:upcycle_command",
        "grow one expert per group of a model into many",
        "runs/tiny --experts text=4,visual=2 --out runs/tiny-moe",
    ),
    "export": (
        "mmpt.train.export:export",
        "write the model of a run as one folder of safetensors",
        "runs/tiny --out models/tiny",
    ),
    "push": (
        "mmpt.push:push",
        "put a model or a tokenizer on a hub, with a card",
        "models/tiny owner/tiny --private",
    ),
    "eval": (
        "mmpt.eval.heldout:evaluate_model",
        "held-out likelihood of a model by modality; with --compare, the quality gate",
        "runs/quickstart/model --tokens runs/quickstart/tokens",
    ),
    "report": (
        "mmpt.eval.training:report_command",
        "show and compare training runs on one page",
        "runs/tiny runs/other --out report.html",
    ),
    "scaling": (
        "mmpt.eval.scaling:scaling_command",
        "fit held-out losses of runs to their compute, and predict a larger run",
        "runs/s runs/m runs/l runs/xl --out scaling.html --json",
    ),
    "savings": (
        "mmpt.eval.savings:savings_command",
        "train sparse variants beside a dense model, and say how much compute they save",
        "examples/recipes/savings.toml --out runs/savings --variants dense,4t2v2s --seeds 3",
    ),
    "bench": (
        "mmpt.bench:bench",
        "measure a part side by side with others",
        "codecs --json",
    ),
    "generate": (
        "mmpt.generate:generate",
        "generate parts from parts",
        "runs/quickstart/model 'red apple' --to image --out apple.png",
    ),
    "demo": (
        "mmpt.demo:demo",
        "talk with a model in the browser, in text, pictures, speech and clips",
        "runs/quickstart/model",
    ),
    "replay": (
        "mmpt.replay:replay",
        "make a generated file again from its metadata, and name the first id that differs",
        "apple.png --model runs/quickstart/model",
    ),
    "inspect": (
        "mmpt.ribbon:inspect_file",
        "show the ids of a generated file: media, codes, experts and likelihood, on one page",
        "apple.png --model runs/quickstart/model --out apple.html",
    ),
}

# read when torch is loaded: large pages for large tensors make training steps faster
ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 1 damage was found, 2 a mistake of the user,
    130 interrupted.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = _split_verb(arguments)
    if name is None:
        return _print_help(arguments)
    path, summary, example = VERBS[name]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):  # each request of a hub, at a level that is for people
        logging.getLogger(library).setLevel(logging.WARNING)
    debug = bool(os.environ.get("MMPT_DEBUG"))
    try:
        module, function = path.split(":")
        verb = getattr(importlib.import_module(module), function)
        parser = _parser(name, verb, summary, example)
        options = vars(parser.parse_intermixed_args(rest))
        as_json = options.pop("json")
        result = _call(verb, options)
        if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
            print(json.dumps(result) if as_json else _render(result))
        return int(result.get("exit_status", 0)) if isinstance(result, dict) else 0
    except UserError as error:
        if debug:
            raise
        print(f"mmpt {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"mmpt {name}:{where}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmpt {name}: stopped; the same command resumes where it can", file=sys.stderr)
        return 130


def _split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if len(arguments) >= length and name in VERBS:
            return name, arguments[length:]
    return None, arguments


def _print_help(arguments: list[str]) -> int:
    asked = not arguments or arguments[-1] in ("-h", "--help")
    words = [word for word in arguments if not word.startswith("-")]
    chosen = [name for name in VERBS if name.split()[: len(words)] == words]
    stream = sys.stdout if asked and chosen else sys.stderr
    if not chosen:
        print(f"mmpt: unknown verb {' '.join(words)!r}; the verbs are:", file=stream)
    else:
        print("usage: mmpt VERB [ARGUMENTS]; mmpt VERB --help says more\n", file=stream)
    for name in chosen or VERBS:
        print(f"  {name:20} {VERBS[name][1]}", file=stream)
    return 0 if asked and chosen else 2


def _parser(
    name: str, verb: Callable[..., Any], summary: str, example: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"mmpt {name}",
        description=inspect.getdoc(verb) or summary,
        epilog=f"example: mmpt {name} {example}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(verb)
    for parameter in inspect.signature(verb).parameters.values():
        _add_argument(parser, parameter, hints[parameter.name])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


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
            if parameter.default not in (None, False, ()):
                options["help"] = f"default: {parameter.default}"
        flag = parameter.name.rstrip("_").replace("_", "-")  # from_ is --from
        parser.add_argument(f"--{flag}", dest=parameter.name, **options)
        return
    if many:
        options["nargs"] = "+" if required else "*"
    elif not required:
        options["nargs"] = "?"
    if not required:
        options["default"] = parameter.default
    parser.add_argument(parameter.name, type=kind, metavar=parameter.name.upper(), **options)


def _call(verb: Callable[..., Any], options: dict[str, Any]) -> Any:
    positional, keyword = [], {}
    for parameter in inspect.signature(verb).parameters.values():
        value = options[parameter.name]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            keyword[parameter.name] = value
        else:
            positional.append(value)
    return verb(*positional, **keyword)


def _render(result: Any, indent: str = "") -> str:
    """Nested dicts and lists as indented lines; a result of another kind says itself what it is."""
    if type(result) is not dict:
        return str(result)
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", _render(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{indent}{key}:"]
            lines += [
                re.sub(r"^(\s*)  ", r"\1- ", _render(row, indent + "  "), count=1) for row in value
            ]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    sys.exit(main())
