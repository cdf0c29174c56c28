"""Shipped things: of the wheel where it has them, of the checkout otherwise, or one line."""

from pathlib import Path

import pytest

from mmpt import hub
from mmpt.config import UserError
from mmpt.tokenizers.base import load_codec


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty installation: the folder `mmpt` inside site-packages."""
    folder = tmp_path / "site" / "mmpt"
    folder.mkdir(parents=True)
    monkeypatch.setattr(hub, "_PACKAGE", folder)
    return folder


def test_a_checkout_is_found_beside_the_package(package: Path) -> None:
    root = package.parent
    for folder in ("tokenizers", "examples/recipes"):
        (root / folder).mkdir(parents=True)
    assert not hub.holds("tokenizers")  # site-packages may hold such a folder of others
    (root / "pyproject.toml").write_text("")
    assert hub.shipped("tokenizers") == root / "tokenizers"
    assert hub.shipped("recipes") == root / "examples" / "recipes"


def test_a_wheel_has_its_own_copies(package: Path) -> None:
    (package.parent / "tokenizers").mkdir()
    (package.parent / "pyproject.toml").write_text("")  # of a tree that the wheel was put into
    (package / "_shipped" / "tokenizers").mkdir(parents=True)
    assert hub.shipped("tokenizers") == package / "_shipped" / "tokenizers"
    assert not hub.holds("data")


def test_what_is_not_there_is_one_line(package: Path) -> None:
    with pytest.raises(UserError, match="holds no data; reinstall") as caught:
        hub.shipped("data")
    assert "\n" not in str(caught.value)


def test_a_folder_opens_where_no_zoo_is(package: Path, zoo: Path) -> None:
    for name in ("text", "image", "video", "speech"):
        assert load_codec(zoo / name).folder == zoo / name
