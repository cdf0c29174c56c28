"""The rules of the house: what may stand where, who may import whom, what is cheap and small."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmpt

ROOT = Path(mmpt.__file__).resolve().parent.parent
MODULES = sorted((ROOT / "mmpt").rglob("*.py"))
MIB = 1 << 20

# imports point one way: a module imports from its own rank and from lower ones
RANKS = (
    (
        "config",
        "muon",
        "vocab",
        "hub",
        "media",
        "metadata",
        "sound",
        "parts",
        "flat",
        "stream",
        "doctor",
        "process",
        "progress",
        "command",
    ),
    ("page", "tokenizers", "data", "processor"),
    ("model",),
    # a run is evaluated, and shows samples, while it trains
    (
        "decode",
        "results",
        "provenance",
        "edit",
        "writer",
        "request",
        "content",
        "answer",
        "card",
        "train",
        "eval",
        "plan",
        "pipeline",
        "convert",
    ),
    (
        "serve",
        "generate",
        "push",
        "replay",
        "ribbon",
        "showcase",
        "quickstart",
        "demo",
        "bench",
        "__main__",
    ),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            if node.module == "mmpt":
                yield from ((node.lineno, f"mmpt.{alias.name}") for alias in node.names)
            elif node.module:
                yield node.lineno, node.module


def run(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd="/"
    ).stdout


def tracked() -> list[Path]:
    """The files that git has or would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_folders_of_things_hold_no_python_but_prepare_scripts() -> None:
    for folder in ("tokenizers", "data"):
        found = [p for p in (ROOT / folder).rglob("*.py") if p.name != "prepare.py"]
        assert found == []  # a package named tokenizers would shadow Hugging Face's


def test_hugging_face_tokenizers_is_not_shadowed() -> None:
    assert "site-packages" in run("import tokenizers; print(tokenizers.__file__)")


def test_imports_point_one_way() -> None:
    wrong = []
    for path in MODULES:
        name = path.relative_to(ROOT / "mmpt").with_suffix("").parts[0]
        if name == "__init__":
            continue  # the public names, which are loaded when they are used
        assert name in RANK, f"give mmpt.{name} a rank"
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "mmpt" and len(parts) > 1 and RANK[parts[1]] > RANK[name]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_importing_mmpt_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import mmpt; "
        "print(time.perf_counter() - begin, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    runs = [run(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    assert runs[0][1:] == ["False", "False"]


def test_help_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); from mmpt.__main__ import main; "
        "assert main(['--help']) == 0; "
        "print(time.perf_counter() - begin, 'torch' in sys.modules)"
    )
    runs = [run(code).split()[-2:] for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.6
    assert runs[0][1] == "False"


def test_parts_load_no_torch() -> None:
    assert run("import sys, mmpt; mmpt.Text('a'); print('torch' in sys.modules)") == "False\n"


def test_files_in_git_are_small() -> None:
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in tracked()}
    assert {str(p): size for p, size in sizes.items() if size > 14 * MIB} == {}
    assert sum(sizes.values()) < 56 * MIB
    for folder, limit in (("tokenizers", 24), ("data/sampler", 14)):
        total = sum(size for path, size in sizes.items() if path.is_relative_to(folder))
        assert total < limit * MIB, folder


def test_nothing_of_ours_unpickles() -> None:
    for path in MODULES:
        found = {module.split(".")[0] for _, module in imports(path)}
        assert not found & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in (("torch", "load"), ("torch", "save")), (
                    path
                )
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_only_the_command_line_prints() -> None:
    for path in MODULES:
        if path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_every_module_says_what_it_is_and_is_ascii() -> None:
    for path in MODULES:
        text = path.read_text()
        assert text.isascii(), path
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path


def test_no_part_of_the_package_has_the_name_of_a_library_it_needs() -> None:
    # `python mmpt/foo.py` would put mmpt/ first on the path
    needed = {"torch", "numpy", "PIL", "av", "soundfile", "safetensors", "webdataset", "tqdm"}
    assert not needed & {path.stem for path in (ROOT / "mmpt").iterdir()}
