"""Where things come from: the folders that mmpt ships, and models on a hub.

What is on a hub is named `owner/name`, or `owner/name@revision` (a branch, a tag or a commit). A
folder of that name here comes first; what was fetched once is opened without network. Of a
repository only files with the names of ours are taken: safetensors, JSON, TOML and cards.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mmpt.config import UserError

_PACKAGE = Path(__file__).resolve().parent

# of a model; those in folders are of codecs that stand beside it
FILES = (
    "config.json",
    "model.safetensors",
    "model/*.safetensors",
    "vocabulary.json",
    "processor.json",
    "recipe.toml",
    "tokenizer.json",
    "README.md",
    "LICENSE",
    "*/config.json",
    "*/model.safetensors",
    "*/tokenizer.json",
    "*/README.md",
    "*/LICENSE",
)
MAX_TEXT = 64 << 20  # bytes of a file that is read whole and is no tensors
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_CODEC = re.compile(r"(\./)?\w[\w.-]*")  # shipped, or beside the model; nowhere else


class HubName(NamedTuple):
    """`owner/name`, and a branch, a tag or a commit; None: the newest of the main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str, revision: str | None = None) -> "HubName":
        """Read `owner/name` or `owner/name@revision`. Raises UserError for anything else."""
        if (found := _NAME.fullmatch(text)) is None:
            raise UserError(f"{text!r} is no name on a hub; give owner/name or owner/name@revision")
        if revision is not None and found["revision"] not in (None, revision):
            raise UserError(f"{text} is not of revision {revision!r}; give one of the two")
        return cls(found["repo"], revision or found["revision"])

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


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


def name_of(text: str | Path, revision: str | None = None) -> HubName | None:
    """What a text names on a hub; None where it is a path of this machine, or no name at all.

    Without a revision, something in a folder that is here is a mistyped path rather than a name.
    Raises UserError for a revision of what is no name on a hub.
    """
    path, is_name = Path(text), _NAME.fullmatch(str(text)) is not None
    if is_name and not path.exists():
        name = HubName.of(str(text), revision)
        if name.revision is not None or not path.parent.is_dir():
            return name
    if revision is not None:
        raise UserError(f"revision {revision!r} is of a hub; {text} is no owner/name there")
    return None


def fetch(
    name: HubName,
    *,
    force_download: bool = False,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder that holds the files of a model or a codec, fetched where it is not here yet.

    What is here whole is taken as it is: a branch may have moved on since. force_download: ask the
    hub anew. local_files_only: never ask it. cache_dir, token: as huggingface_hub takes them.
    Raises UserError in one line: no such repository or revision, no network, too large, not ours.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    get = partial(
        snapshot_download,
        name.repo,
        allow_patterns=list(FILES),
        cache_dir=cache_dir,
        token=token,
        library_name="mmpt",
    )
    with _one_line(name):
        try:
            if force_download and not local_files_only:
                raise LocalEntryNotFoundError("asked anew")
            folder = get(revision=name.revision, local_files_only=True)
            if not _is_whole(Path(folder)):  # others looked at its card alone, say
                raise LocalEntryNotFoundError("only parts of it are here")
        except LocalEntryNotFoundError:  # nothing, or not all of it
            if local_files_only:
                raise
            files = get(revision=name.revision, dry_run=True, force_download=force_download)
            _check_sizes(name, files)
            # the commit whose sizes were seen, whatever its branch has become
            folder = get(revision=files[0].commit_hash, force_download=force_download)
    _check_codecs(name, Path(folder))
    return Path(folder)


def push(
    folder: str | Path,
    name: HubName,
    *,
    private: bool | None = None,
    message: str = "Push with mmpt",
    token: str | None = None,
) -> str:
    """Make a repository what a folder of ours holds, in one commit; returns the commit's address.

    A repository, or a branch, that is not there is made. private: None leaves it to the owner's
    default; True refuses a repository that everybody can read. Raises UserError in one line.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="mmpt")
    with _one_line(name):
        api.create_repo(name.repo, private=private, exist_ok=True)
        if private and not api.model_info(name.repo).private:
            raise UserError(f"{name.repo} is there and public; make it private first")
        if name.revision is not None:
            api.create_branch(name.repo, branch=name.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name.repo,
            folder_path=folder,
            revision=name.revision,
            allow_patterns=list(FILES),
            delete_patterns=list(FILES),  # what an earlier model had and this one has not
            commit_message=message,
        )
    return done.commit_url


def _is_whole(folder: Path) -> bool:
    weights = ("model.safetensors", "model/*.safetensors", "tokenizer.json")
    return (folder / "config.json").is_file() and any(any(folder.glob(w)) for w in weights)


def _check_sizes(name: HubName, files: list) -> None:
    """Refuse what does not fit on the disk, and text that nobody would write."""
    if not any(file.filename == "config.json" for file in files):
        raise UserError(f"{name} on the hub holds no config.json; it is nothing of mmpt")
    for file in files:
        if not file.filename.endswith(".safetensors") and (file.file_size or 0) > MAX_TEXT:
            raise UserError(f"{file.filename} of {name} has {file.file_size:,} bytes; not fetched")
    need = sum(file.file_size or 0 for file in files if file.will_download)
    place = next(parent for parent in Path(files[0].local_path).parents if parent.is_dir())
    if need > (free := shutil.disk_usage(place).free):
        raise UserError(f"{name} needs {need:,} bytes, and {place} has {free:,} left")


def _check_codecs(name: HubName, folder: Path) -> None:
    """A model of others may not open whatever it likes on this machine."""
    try:
        given = json.loads((folder / "processor.json").read_text())["tokenizers"]
        wrong = [each for each in given if not _CODEC.fullmatch(each)]
    except FileNotFoundError:
        return  # a codec, or a model without one
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: processor.json cannot be read: {error!r}") from None
    if wrong:
        raise UserError(f"{name} names a tokenizer outside of it ({wrong[0]}); not opened")


@contextmanager
def _one_line(name: HubName) -> Iterator[None]:
    """What a hub and the way to it can raise, as one line for the user."""
    from huggingface_hub import errors

    # the last one is httpx's, whichever version of it the library uses
    known = (OSError, errors.HFValidationError, errors.HTTPError)  # type: ignore[reportPrivateImportUsage]
    try:
        yield
    except known as error:
        # a dry run that fails hides why
        hidden = isinstance(error, errors.DryRunError)
        reason = _reason(name, error.__cause__ if hidden else error)
        raise UserError(" ".join(reason.split())[:400]) from None


def _reason(name: HubName, error: BaseException | None) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"{name} asks for consent at {hub}/{name.repo}; give it there, then log in here"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no {name.repo} at {hub}; check the name, or log in where it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.repo} at {hub} has no revision {name.revision!r}"
    if isinstance(error, errors.HfHubHTTPError):
        return f"{hub} refused {name}: {error}"
    if isinstance(error, errors.HFValidationError):
        return f"{name} is no name on a hub: {error}"
    if isinstance(error, OSError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{name}: {error}"
    return f"{hub} is out of reach, and {name} is neither a folder here nor was it fetched before"
