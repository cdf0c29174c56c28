"""Folders of films with captions, and LeRobot data sets (version 2): an episode and its task."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, LeftOut
from mmpt.data.formats.files import base_of, each, read_inside, root_of, walk
from mmpt.media import read_text

FILMS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".webp")
LISTS = "metadata.jsonl"
CAPTIONS = ("text", "caption", "prompt", "description")  # keys, the first that is there
EPISODE = re.compile(r"episode_(\d+)\.mp4")


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Clips of a folder with their captions, as two views of one idea.

    The caption of a clip stands in metadata.jsonl of its folder or of one above (lines with
    file_name and text), else in NAME.txt or NAME.json beside it. In a LeRobot folder an episode is
    one document: its tasks, then the films of all cameras. Films are read without their sound.
    """
    if (path / "meta" / "info.json").is_file():
        yield from _read_lerobot(path)
        return
    root, lists = root_of(path), {}
    yield from each(walk(path, FILMS), lambda file: _read_clip(file, root, lists))


def _read_clip(file: Path, root: Path, lists: dict[Path, dict[str, str]]) -> Iterator[Item]:
    caption = _caption(file, root, lists)
    draft = Draft(str(file), 0, base_of(file, root), order="any")
    draft.text(caption)
    draft.add("video", file.name, lambda: read_inside(root, file))
    if draft.lost:  # a text alone is no document of a clip
        raise UserError(draft.lost[0])
    yield draft


def _caption(file: Path, root: Path, lists: dict[Path, dict[str, str]]) -> str:
    for folder in file.parents:
        if folder not in lists:
            lists[folder] = _read_list(root, folder / LISTS)
        if found := lists[folder].get(file.relative_to(folder).as_posix()):
            return found
        if folder == root:
            break
    for suffix in (".txt", ".json"):
        beside = file.with_suffix(suffix)
        if beside.is_file():
            text = read_text(read_inside(root, beside))
            caption = _caption_in(_parse(text, beside.name)) if suffix == ".json" else text
            if caption.strip():
                return caption
    raise UserError(f"no caption: {file.name} is in no {LISTS}, and has no .txt or .json beside it")


def _read_list(root: Path, path: Path) -> dict[str, str]:
    """file_name -> caption."""
    if not path.is_file():
        return {}
    captions = {}
    for _, row in _rows(root, path):  # a clip that a bad line should have named has no caption
        name = row.get("file_name") if isinstance(row, dict) else None
        if isinstance(name, str):
            captions[name.removeprefix("./")] = _caption_in(row)
    return captions


def _rows(root: Path, path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number and table of each line, or what is wrong with it."""
    for number, line in enumerate(read_text(read_inside(root, path)).splitlines()):
        if not line.strip():
            continue
        try:
            row = _parse(line, f"{path.name}: line {number + 1}")
            yield number, row if isinstance(row, dict) else "bad json: the line is no table"
        except UserError as error:
            yield number, str(error)


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"bad json: {name}: {error}") from None


def _caption_in(row: Any) -> str:
    """The caption of a table, or a JSON that is one string."""
    values = [row] if isinstance(row, str) else []
    if isinstance(row, dict):
        values = [row[key] for key in CAPTIONS if key in row]
    return next((value for value in values if isinstance(value, str)), "")


def _read_lerobot(root: Path) -> Iterator[Item]:
    info = _parse(read_text(read_inside(root, root / "meta" / "info.json")), "info.json")
    version = str(info.get("codebase_version")) if isinstance(info, dict) else "unknown"
    if not version.startswith("v2"):
        # from version 3 on one film holds many episodes
        raise UserError(f"LeRobot {version}: only v2 is read; convert it to v2.1 first")
    films: dict[int, list[Path]] = {}
    for file in walk(root / "videos", (".mp4",)):
        if found := EPISODE.fullmatch(file.name):
            films.setdefault(int(found[1]), []).append(file)
    for number, row in _rows(root, root / "meta" / "episodes.jsonl"):
        try:
            yield _episode(root, row, number, films)
        except UserError as error:
            yield LeftOut(str(root), number, f"line {number + 1}", str(error))


def _episode(
    root: Path, row: dict[str, Any] | str, number: int, films: dict[int, list[Path]]
) -> Draft:
    if isinstance(row, str):
        raise UserError(row)
    index, tasks = row.get("episode_index"), row.get("tasks")
    if type(index) is not int or index not in films:
        raise UserError(f"missing file: no film of episode {index!r}")
    if not isinstance(tasks, list) or not any(isinstance(task, str) for task in tasks):
        raise UserError("no caption: the episode has no tasks")
    draft = Draft(str(root), number, f"{root.resolve().name}/episode-{index}", order="any")
    for task in tasks:
        draft.text(str(task), joint="\n")
    for file in films[index]:
        camera = file.parent.name
        draft.add("video", camera, lambda f=file: read_inside(root, f), camera=camera)
    if not any(part["type"] == "video" for part in draft.parts):
        raise UserError(draft.lost[0])
    return draft
