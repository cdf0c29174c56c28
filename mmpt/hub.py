"""Where shipped things are: the checkout's folders, or their copies inside an installed wheel."""

from pathlib import Path

from mmpt.config import UserError

_PACKAGE = Path(__file__).resolve().parent


def shipped(what: str) -> Path:
    """The folder of `tokenizers`, `data/sampler` or `recipes`."""
    in_checkout = {"recipes": "examples/recipes"}.get(what, what)
    for folder in (_PACKAGE.parent / in_checkout, _PACKAGE / "_shipped" / what):
        # a checkout is known by its pyproject.toml: site-packages may hold a folder `tokenizers`
        if folder.is_dir() and (
            folder.is_relative_to(_PACKAGE) or (_PACKAGE.parent / "pyproject.toml").is_file()
        ):
            return folder
    raise UserError(f"this installation holds no {what}; reinstall mmpt")
