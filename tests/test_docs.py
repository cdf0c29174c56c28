"""The pages under docs/: their changes apply and work, their links and names lead somewhere."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmpt

ROOT = Path(mmpt.__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = ("add-a-codec", "add-a-modality", "add-a-router", "add-a-sampler")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DRIVER = """
import os, sys
for page in sys.argv[1:]:
    os.mkdir(page)
    os.chdir(page)
    exec(compile(open(f"../{page}.py").read(), page, "exec"), {"__name__": "__main__"})
    os.chdir("..")
    print(page, "works")
"""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    found = BLOCK.findall((DOCS / f"{page}.md").read_text())
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the changes of all pages; beside it what they run, PAGE.py."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "mmpt", folder / "mmpt", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tokenizers", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for page in PAGES:
        for text in blocks(page, "diff"):
            command = ["git", "apply", "-"]
            done = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True)
            assert not done.returncode, f"{page}.md: {done.stderr}"
        scripts = []
        for text in blocks(page, "python"):
            place = re.match(r"# (mmpt/\S+\.py)\n", text)
            if place is None:
                scripts.append(text)
            else:
                (folder / place[1]).write_text(text)
        (folder / f"{page}.py").write_text("\n".join(scripts))
    return folder


@pytest.mark.skipif(not shutil.which("git"), reason="the changes are applied by git")
def test_the_changes_of_the_pages_apply_and_work(changed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *PAGES],
        cwd=changed,
        env=os.environ | {"PYTHONPATH": str(changed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == [f"{page} works" for page in PAGES]


@pytest.mark.skipif(not shutil.which("git"), reason="the changes are applied by git")
def test_the_code_of_the_pages_is_formatted(changed: Path) -> None:
    files = [f"{page}.py" for page in PAGES]
    for command in (["check", "--select", "E,F,I,UP,B"], ["format", "--check"]):
        options = ["--no-cache", "--line-length", "100", "--config", str(ROOT / "pyproject.toml")]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options, "mmpt", *files],
            cwd=changed,
            capture_output=True,
            text=True,
        )
        assert not done.returncode, done.stdout


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith("http") or (DOCS / target).exists(), f"{page.name}: {target}"


def test_the_reference_covers_every_public_name_and_all_of_it_is_documented(tmp_path: Path) -> None:
    doc = pytest.importorskip("pdoc.doc", reason="pdoc is not installed: mmpt[test]")
    runpy.run_path(str(DOCS / "reference.py"))["write"](tmp_path, ["mmpt"])
    page = (tmp_path / "mmpt.html").read_text()
    known = doc.Module(mmpt).members
    for name in mmpt.__all__:
        members = {name: known[name]}
        for key, member in getattr(known[name], "members", {}).items():
            if member.kind == "function" and (key == "__call__" or not key.startswith("_")):
                members[f"{name}.{key}"] = member
        for path, member in members.items():
            assert f'id="{path}"' in page, path
            assert member.docstring, f"{path} has no docstring"


def test_the_table_of_papers_names_what_the_code_names_and_what_exists() -> None:
    text = (DOCS / "papers.md").read_text()
    number = re.compile(r"\b\d{4}\.\d{5}\b")
    sources = [path.read_text() for path in (ROOT / "mmpt").rglob("*.py")]
    cited = {each for source in sources for each in number.findall(source)}
    assert set(number.findall(text)) == cited
    for module, symbol in re.findall(r"`(mmpt[\w.]+):(\w+)`", text):
        assert hasattr(importlib.import_module(module), symbol), f"{module}:{symbol}"
    for path in re.findall(r"`((?:tests|tokenizers|examples)/[\w./-]+)`", text):
        assert (ROOT / path).is_file(), path
