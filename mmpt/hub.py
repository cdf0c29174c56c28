"""Where shipped things are: the checkout's folders, or their copies inside an installed wheel."""

from pathlib import Path

from mmpt.config import UserError

_PACKAGE = Path(__file__).resolve().parent


def shipped(what: str) -> Path:
    """The folder of `tokenizers`, `data`, `data/sampler` or `recipes`."""
    copies = _PACKAGE / "_shipped"  # only an installed wheel has it
    in_checkout = {"recipes": "examples/recipes"}.get(what, what)
    folder = copies / what if copies.is_dir() else _PACKAGE.parent / in_checkout
    # site-packages may hold a folder `tokenizers` of others: a checkout has a pyproject.toml
    if folder.is_dir() and (copies.is_dir() or (_PACKAGE.parent / "pyproject.toml").is_file()):
        return folder
    raise UserError(f"this installation holds no {what}; reinstall mmpt")


def holds(what: str) -> bool:
    """Whether `shipped` finds it."""
    try:
        return shipped(what).is_dir()
    except UserError:
        return False
