"""What is asked of a model: parts, messages and slots in order, a seed, and every setting.

A `Generate` slot stands where the model is to write; what comes before it, given or made, is what
it sees. A `Request` is complete: as JSON it says the same in another version, whose defaults may
differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self, get_args

from mmpt.config import UserError, from_dict
from mmpt.content import part_from_json, part_of, part_to_json, redo_from_json, redo_to_json
from mmpt.edit import Edit
from mmpt.parts import Audio, Image, Message, Part, Text, Video
from mmpt.results import Medium, Settings

FORMAT_VERSION = 1
MEDIUM_OF: dict[type, Medium] = {Image: "image", Video: "video", Audio: "speech"}


@dataclass(frozen=True, init=False, eq=False)
class Generate:
    """A slot for a part of `medium`; without one, the model decides what comes.

        Generate("image", height=64, width=64, guidance=2.0)

    begin: a clip of 1 + 4 n frames that a video continues. edit: a part of which a region is made
    anew. settings: fields of `Settings` for this slot. Raises UserError for others.
    """

    medium: Medium | None
    begin: Video | None
    edit: Edit | None
    settings: Mapping[str, Any]

    def __init__(
        self,
        medium: Medium | None = None,
        *,
        begin: Video | None = None,
        edit: Edit | None = None,
        **settings: Any,
    ) -> None:
        known = get_args(Medium)
        if medium is not None and medium not in known:
            match = get_close_matches(str(medium), known, n=1)
            help_ = f"did you mean {match[0]!r}?" if match else f"choose {', '.join(known)}"
            raise UserError(f"no medium {medium!r}; {help_}")
        if begin is not None and medium != "video":
            raise UserError("begin is a clip to continue; it needs a slot of medium 'video'")
        if edit is not None:
            own = MEDIUM_OF[type(edit.part)]
            if medium not in (None, own) or begin is not None:
                raise UserError(f"the edit is of {own}; leave out to = {medium!r} and begin")
            medium = own
        from_dict(Settings, settings, where="settings")
        for name, value in zip(
            ("medium", "begin", "edit", "settings"), (medium, begin, edit, settings), strict=True
        ):
            object.__setattr__(self, name, value)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Generate":
        """The same slot with every setting said; an edit is decoded in parallel unless told."""
        given = {"decoder": "dida"} if self.edit is not None else {}
        chosen = from_dict(Settings, given | {**defaults, **self.settings}, where="settings")
        return Generate(self.medium, begin=self.begin, edit=self.edit, **asdict(chosen))

    @property
    def chosen(self) -> Settings:
        """The settings."""
        return from_dict(Settings, self.settings, where="settings")


Item = Part | Message | Generate
Given = Any  # an Item, or what `part_of` takes for a part, or a message as a dictionary


@dataclass(frozen=True, eq=False)
class Request:
    """What is given and where the model writes, in order. `of` builds one from what people have."""

    items: tuple[Item, ...]
    seed: int = 0

    @classmethod
    def of(
        cls,
        items: Sequence[Given],
        *,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> Self:
        """settings: of all slots that do not say otherwise. Without a slot there is one at the end,
        of medium `to`. Raises UserError in one line for what no model can be given.
        """
        settings, read = settings or {}, [_item(item) for item in items]
        from_dict(Settings, settings, where="settings")
        if not any(isinstance(item, Generate) for item in read):
            read.append(Generate(to, begin=begin, edit=edit))
        elif to is not None or begin is not None or edit is not None:
            raise UserError("to, begin and edit are of calls without slots; give them to Generate")
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise UserError(f"seed = {seed!r}; use a whole number from 0 on")
        full = [i.with_defaults(settings) if isinstance(i, Generate) else i for i in read]
        return cls(tuple(i for i in full if not (isinstance(i, Text) and not i.text)), seed)

    @property
    def slots(self) -> list[Generate]:
        """Where the model writes."""
        return [item for item in self.items if isinstance(item, Generate)]

    @property
    def spoken(self) -> tuple[bool, ...]:
        """Of each slot, whether it stands in a conversation."""
        turns = [isinstance(item, Message) for item in self.items]
        places = [n for n, item in enumerate(self.items) if isinstance(item, Generate)]
        return tuple(any(turns[:place]) for place in places)

    def filled(self, made: Sequence[Part], counts: Sequence[int]) -> list[Part]:
        """The parts of all items in order, `counts[i]` of those that were made in slot i."""
        rest, sizes = iter(made), iter(counts)
        return [part for item in self.items for part in _parts(item, rest, sizes)]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; media are content, not names of files."""
        items = [_to_json(item) for item in self.items]
        return {"format_version": FORMAT_VERSION, "seed": self.seed, "items": items}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` gave. Raises UserError for anything else."""
        try:
            if data["format_version"] > FORMAT_VERSION:
                raise UserError(
                    f"a request of format {data['format_version']}; this mmpt reads "
                    f"{FORMAT_VERSION}: upgrade"
                )
            return cls.of([_from_json(item) for item in data["items"]], seed=data["seed"])
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"this is no request: {error!r}") from None


def _item(given: Given) -> Item:
    if isinstance(given, Generate):
        return given
    if isinstance(given, Mapping):
        return _message_of(given)
    if isinstance(given, Message):
        if given.role not in ("user", "assistant"):
            raise UserError(f"a message of {given.role!r}; use 'user' or 'assistant'")
        content = given.content
        single = isinstance(content, str | Path) or not isinstance(content, Sequence)
        return Message(given.role, tuple(map(part_of, [content] if single else content)))
    return part_of(given)


def _message_of(given: Mapping[str, Any]) -> Message:
    """{"role": ..., "content": text or [{"type": "image", "image": ...}, ...]}"""
    content = given.get("content")
    if given.get("role") not in ("user", "assistant") or content is None:
        raise UserError(
            f"a dictionary of {', '.join(map(str, given)) or 'nothing'} is no message; it needs "
            "role ('user' or 'assistant') and content"
        )
    pieces = [content] if isinstance(content, str) else content
    parts = [
        part_of(p[p["type"]] if isinstance(p, Mapping) and p.get("type") in p else p)
        for p in pieces
    ]
    return Message(given["role"], tuple(parts))


def _parts(item: Item, made: Iterator[Part], counts: Iterator[int]) -> list[Part]:
    if isinstance(item, Generate):
        return [next(made) for _ in range(next(counts))]
    return list(item.content) if isinstance(item, Message) else [item]


def _to_json(item: Item) -> dict[str, Any]:
    if isinstance(item, Message):
        content = [part_to_json(part) for part in item.content]
        return {"type": "message", "role": item.role, "content": content}
    if not isinstance(item, Generate):
        return part_to_json(item)
    slot: dict[str, Any] = {"type": "generate", "medium": item.medium}
    settings = item.settings.items()
    slot["settings"] = {n: list(v) if isinstance(v, tuple) else v for n, v in settings}
    if item.begin is not None:
        slot["begin"] = part_to_json(item.begin)
    if item.edit is not None:
        slot["edit"] = part_to_json(item.edit.part) | {"redo": redo_to_json(item.edit.redo)}
    return slot


def _from_json(data: Mapping[str, Any]) -> Item:
    if data["type"] == "message":
        return Message(data["role"], tuple(part_from_json(part) for part in data["content"]))
    if data["type"] != "generate":
        return part_from_json(data)
    begin, edit = data.get("begin"), data.get("edit")
    clip = None if begin is None else part_from_json(begin)
    changed = None
    if edit is not None:
        part = part_from_json(edit)
        changed = Edit(part, redo_from_json(edit["redo"]))  # type: ignore[arg-type] # which Edit checks
    return Generate(data["medium"], begin=clip, edit=changed, **data["settings"])  # type: ignore[arg-type] # which Generate checks
