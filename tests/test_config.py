"""Recipes: a misspelt or ill-typed key never passes, files are written whole or not at all."""

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpt.config import UserError, from_dict, load_recipe, to_dict, to_toml, write_atomic


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    levels: tuple[int, ...] = (8, 5)
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    lr: float = 1e-3
    steps: int = 10
    fast: bool = False
    mode: Literal["ar", "dida"] = "ar"
    pair: tuple[int, float] = (1, 2.0)
    note: str | None = None
    inner: Inner = field(default_factory=Inner)
    sources: dict[str, Inner] = field(default_factory=dict)


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(Recipe, path, overrides)


def test_a_recipe_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    recipe = load(tmp_path, 'name = "cat"\nlr = 1\n[inner]\nlevels = [3]\n')
    assert recipe == Recipe(name="cat", lr=1.0, inner=Inner(levels=(3,)))
    assert type(recipe.lr) is float


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ('name = "a"\nstpes = 3', "'steps'"),
        ('name = "a"\n[inner]\nwidht = 3', "'width'"),
        ('name = "a"\n[sources.x]\nlevel = [3]', "'levels'"),
    ],
)
def test_an_unknown_key_is_refused_and_names_the_nearest(
    tmp_path: Path, text: str, nearest: str
) -> None:
    with pytest.raises(UserError, match="unknown key") as caught:
        load(tmp_path, text)
    assert f"did you mean {nearest}?" in str(caught.value)


def test_an_unknown_key_that_is_near_to_none_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known keys: name, lr, steps"):
        load(tmp_path, 'name = "a"\nqqqq = 3')


@pytest.mark.parametrize(
    "line",
    [
        "steps = 1.5",
        "steps = true",
        'steps = "10"',
        'lr = "fast"',
        "fast = 1",
        "name = 3",
        'mode = "both"',
        "pair = [1]",
        "pair = [1, 2, 3]",
        "inner = 3",
        "sources = 3",
        "sources.x = 3",
        "inner.levels = 3",
        "inner.levels = [1.5]",
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(tmp_path: Path, line: str) -> None:
    text = line if line.startswith("name") else f'name = "a"\n{line}'
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert line.split()[0].split(".")[0] in str(caught.value)


def test_a_missing_key_a_missing_file_and_broken_toml_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing name"):
        load(tmp_path, "")
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(Recipe, tmp_path / "absent.toml")
    with pytest.raises(UserError, match="Is a directory"):
        load_recipe(Recipe, tmp_path)
    with pytest.raises(UserError, match="not valid TOML"):
        load(tmp_path, "name = ")
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(UserError, match="not valid TOML"):
        load_recipe(Recipe, tmp_path / "bytes.toml")


def test_overrides_win_and_bare_words_are_strings(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        'name = "a"\nsteps = 3\n',
        "name=a cat",
        "steps=7",
        "fast=true",
        "inner.levels=[2, 2]",
        "sources.x.width=4",
        "note=a=b",
    )
    assert (recipe.name, recipe.steps, recipe.fast) == ("a cat", 7, True)
    assert recipe.inner.levels == (2, 2)
    assert recipe.sources == {"x": Inner(width=4)}
    assert recipe.note == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "is not key=value"),
        ("=3", "is not key=value"),
        ("step=3", "did you mean 'steps'"),
        ("steps=many", "must be int"),
        ("name.first=3", "is not a table"),
        ("inner.depth.width=3", "unknown key 'depth'"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, 'name = "a"', override)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
inners = st.builds(
    Inner,
    width=st.integers(-(2**40), 2**40),
    levels=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    limit=st.none() | st.floats(allow_nan=False),
)


@given(
    recipe=st.builds(
        Recipe,
        name=texts,
        lr=st.floats(allow_nan=False),
        fast=st.booleans(),
        mode=st.sampled_from(["ar", "dida"]),
        note=st.none() | texts,
        inner=inners,
        sources=st.dictionaries(texts, inners, max_size=2),
    )
)
def test_any_recipe_comes_back_from_its_toml(recipe: Recipe) -> None:
    import tomllib

    assert from_dict(Recipe, tomllib.loads(to_toml(recipe))) == recipe
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_a_file_is_replaced_whole_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_atomic(path, "one")
    write_atomic(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("fails", ["write", "rename"])
def test_a_failed_write_is_one_line_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: str
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    real_write = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        real_write(self, data[: len(data) // 2])
        raise OSError(code, os.strerror(code), str(self))

    def rename(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code), str(source))

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(Path, "write_bytes", write)
        else:
            patch.setattr(os, "replace", rename)
        with pytest.raises(UserError) as caught:
            write_atomic(path, "something new")
    assert str(caught.value).startswith(f"cannot write {path}: {os.strerror(code)}")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "below.json", tmp_path / ("n" * 300), tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            write_atomic(path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_value_from_code_is_refused_as_well() -> None:
    with pytest.raises(UserError, match="must be a table"):
        from_dict(Recipe, {"name": "a", "inner": cast(Any, [1])})
    with pytest.raises(UserError, match=r"my file: unknown key 'x'"):
        from_dict(Recipe, {"name": "a", "x": 1}, where="my file")
