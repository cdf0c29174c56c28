"""The table of command-line verbs.

A verb is a typed function: parameters before the `*` are positional arguments, those after it are
flags, its docstring is its help, and what it returns is printed (with `--json`, as JSON). Nothing
else comes to stdout. Only the module of the verb that runs is imported, so that `mmpt --help`
answers at once.
"""

import contextlib
import difflib
import importlib
import logging
import os
import sys
import traceback

import mmpt
from mmpt.command import build_parser, call, paint, render, to_json
from mmpt.config import UserError

# verb -> (module:function, one line of help, examples, one on each line)
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
        "data/sampler/*.tar\ndata/sampler/*.tar --repair build/whole",
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
        "image-f8\nimage-f8 data/sampler/emoji-heldout-*.tar --json",
    ),
    "tokenizer roundtrip": (
        "mmpt.tokenizers.evaluate:roundtrip",
        "encode and decode a file of yours",
        "image-f8 cat.png --out cat-decoded.png",
    ),
    "encode": (
        "mmpt.data.encode:encode",
        "turn raw shards into token shards",
        "data/sampler/emoji-train-*.tar --out build/tokens\n"
        "data/sampler/*.tar --workers 2 --augment --out build/augmented",
    ),
    "init": (
        "mmpt.convert.init:init",
        "make a model of all media out of a text model of others",
        "--from models/olmo --codecs image-f8 speech-12hz --out models/start",
    ),
    "plan": (
        "mmpt.plan:plan",
        "say before a run what its numbers should be",
        "examples/recipes/tiny.toml --gpus 8\nexamples/recipes/tiny.toml optim.lr=1e-3 --suggest",
    ),
    "train": (
        "mmpt.train.pretrain:train_command",
        "pretrain a model from a recipe",
        "examples/recipes/tiny.toml --out runs/tiny\n"
        "examples/recipes/tiny.toml steps=500 optim.lr=1e-3 --out runs/short",
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
        "runs/quickstart/model --tokens runs/quickstart/tokens\n"
        "runs/quickstart/model --tasks arc_easy --limit 100",
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
        "runs/quickstart/model 'red apple' --to image --out apple.png\n"
        "runs/quickstart/model apple.png --to text",
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


# a first hour, shown by `mmpt --help`
TOUR = """mmpt quickstart
mmpt data inspect data/sampler/*.tar --json
mmpt train examples/recipes/tiny.toml --out runs/tiny
mmpt generate runs/quickstart/model "red apple" --to image --out apple.png
"""
STATUSES = {
    0: "done",
    1: "done, and what was checked is not in order: damage, a difference, rates that do not hold",
    2: "a mistake of yours, said in one line",
    3: "a fault of mmpt, with its traceback",
    130: "interrupted; the same command goes on where it can",
}
DONE, MISTAKE, FAULT, INTERRUPTED = 0, 2, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns one of STATUSES."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        name, rest = _split_verb(arguments)
        return _answer(arguments) if name is None else _run(name, rest)
    finally:
        _flush()


def _run(name: str, arguments: list[str]) -> int:
    path, summary, examples = VERBS[name]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):  # each request of a hub, at a level that is for people
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever libraries print
            module, function = path.split(":")
            verb = getattr(importlib.import_module(module), function)
            parser = build_parser(f"mmpt {name}", verb, summary, examples)
        options = parser.read(arguments)  # prints its help to stdout
        as_json = options.pop("json")
        with contextlib.redirect_stdout(sys.stderr):
            result = call(verb, options)
        if os.environ.get("RANK", "0") == "0":  # under torchrun one process speaks for all
            _say(to_json(result) if as_json else render(result))
        return int(result.get("exit_status", DONE)) if isinstance(result, dict) else DONE
    except KeyboardInterrupt:
        return _fail(name, "stopped; the same command resumes where it can", INTERRUPTED)
    except Exception as error:
        if os.environ.get("MMPT_DEBUG"):
            raise
        if isinstance(error, UserError):
            return _fail(name, str(error))
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return _fail(name, f"{where}{error.strerror or error}")
        traceback.print_exc()
        return _fail(name, f"a fault of mmpt {mmpt.__version__}: {type(error).__name__}", FAULT)


def _fail(name: str, message: str, status: int = MISTAKE) -> int:
    print(f"{paint(f'mmpt {name}'.strip() + ':', 'red', sys.stderr)} {message}", file=sys.stderr)
    return status


def _say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader has gone, as `| head` does
        print(text, flush=True)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # what is left goes nowhere, without a word at the end of Python
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb and what follows; flags that stand before it are moved behind it."""
    first = next((i for i, each in enumerate(arguments) if not each.startswith("-")), 0)
    flags, words = arguments[:first], arguments[first:]
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in VERBS:
            return name, [*words[length:], *flags]
    return None, arguments


def _answer(arguments: list[str]) -> int:
    """Where no verb runs: the version, help, or what the mistake is."""
    words = [word for word in arguments if not word.startswith("-")]
    flags = set(arguments) - set(words)
    chosen = [name for name in VERBS if name.split()[: len(words)] == words]
    if not chosen:
        return _fail("", _unknown_verb(words))
    if unknown := sorted(flags - {"-h", "--help", "--json", "--version"}):
        return _fail("", f"unknown option {unknown[0]}; mmpt --help shows what there is")
    if "--version" in flags:
        _say(to_json({"version": mmpt.__version__}) if "--json" in flags else mmpt.__version__)
        return DONE
    if words and not flags:
        return _fail(words[0], f"which verb of it? There are: {', '.join(chosen)}")
    _say(to_json(_table(chosen)) if "--json" in flags else _help(chosen, whole=not words))
    return DONE


def _table(names: list[str]) -> dict[str, object]:
    verbs = [
        {
            "verb": name,
            "help": VERBS[name][1],
            "examples": [f"mmpt {name} {line}".rstrip() for line in VERBS[name][2].split("\n")],
        }
        for name in names
    ]
    return {"verbs": verbs, "exit_statuses": STATUSES}


def _help(names: list[str], *, whole: bool) -> str:
    def title(text: str) -> str:
        return paint(text, "bold", sys.stdout)

    lines = [f"{title('usage:')} mmpt VERB [ARGUMENTS]; mmpt VERB --help says more", ""]
    lines += [f"  {name:20} {VERBS[name][1]}" for name in names]
    if whole:
        lines += ["", title("examples:"), *(f"  {line}" for line in TOUR.splitlines())]
        lines += ["", title("with every verb:"), f"  {'--json':20} print the result as JSON"]
        lines += ["", title("exit status:")]
        lines += [f"  {status:<4} {meaning}" for status, meaning in STATUSES.items()]
    return "\n".join(lines)


def _unknown_verb(words: list[str]) -> str:
    group = [name for name in VERBS if name.split()[0] == words[0]]  # if it is one
    unknown = " ".join(words[: 2 if group else 1])
    groups = [name.split()[0] for name in VERBS if " " in name]
    near = [
        (difflib.SequenceMatcher(None, name, " ".join(words[:length])).ratio(), name)
        for name in group or [*VERBS, *groups]
        for length in (1, 2)
    ]
    ratio, best = max(near)
    if ratio > (0.75 if group else 0.6):
        return f"unknown verb {unknown!r}; did you mean mmpt {best}?"
    there = f"; there are: {', '.join(group)}" if group else "; mmpt --help lists what there is"
    return f"unknown verb {unknown!r}{there}"


if __name__ == "__main__":
    sys.exit(main())
