"""The inference API: parts, messages and slots go in, parts come out.

    import mmpt
    from mmpt import Generate
    model = mmpt.load("runs/quickstart/model")
    picture, sound = model("A red apple:", Generate("image"), "It says", Generate("speech"))

`Pipeline.stream` yields typed events while it works. Every result records what is needed to make
it again. Each sample has its own generator, so a batch gives what its singles give. Nothing here
changes while it answers: threads may share a pipeline, and a request that fails leaves no trace.
"""

import shutil
from collections.abc import Generator, Hashable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event as Flag
from threading import Lock
from typing import Any

import torch

from mmpt import hub
from mmpt.answer.decide import Decision
from mmpt.answer.grids import write_grids
from mmpt.answer.plan import Plan, Speed, plan_of
from mmpt.answer.rows import Engine, Row, Tick, Ticks
from mmpt.answer.sound import edit_speech, write_speech
from mmpt.answer.text import write_text
from mmpt.card import CARD, NOBODY, RECIPE, public_recipe, write_card
from mmpt.config import UserError, write_atomic
from mmpt.decode.pool import Pool
from mmpt.edit import Edit
from mmpt.model.transformer import Decoder
from mmpt.model.weights import fingerprint
from mmpt.parts import Image, Video
from mmpt.process import pick_device
from mmpt.processor import Processor
from mmpt.provenance import stamp
from mmpt.request import Generate, Given, Request
from mmpt.results import Cancelled, Event, Medium, Result
from mmpt.train.checkpoint import find_model, find_recipe


class Pipeline:
    """A model with its codecs. `device` follows the model."""

    def __init__(
        self,
        model: Decoder,
        processor: Processor,
        *,
        fingerprint: str = "",
        folder: Path | None = None,
    ) -> None:
        """folder: what it was opened from; its card and its recipe go along when it is saved."""
        self.model = model.eval()
        self.processor = processor
        self.fingerprint = fingerprint
        self.folder = folder
        self._speed: Speed | None = None
        self._measuring = Lock()

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "Pipeline":
        """Open a model folder or a run: the model, its vocabulary and its tokenizers."""
        folder = find_model(folder)
        processor = Processor.from_folder(folder)
        model = Decoder.load(folder, vocabulary=processor.vocabulary).to(pick_device(device))
        return cls(model, processor, fingerprint=fingerprint(folder), folder=folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        device: str = "cpu",
        force_download: bool = False,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> "Pipeline":
        """As `load`, also of `owner/name` or `owner/name@revision` on a hub.

        revision: a branch, a tag or a commit. The other options are those of `mmpt.hub.fetch`: what
        is on this machine is opened without network. Raises UserError in one line.
        """
        if (name := hub.name_of(name_or_path, revision)) is None:
            return cls.load(name_or_path, device=device)
        folder = hub.fetch(
            name,
            force_download=force_download,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            token=token,
        )
        return cls.load(folder, device=device)

    def save_pretrained(
        self, folder: str | Path, *, name: str = NOBODY, license: str | None = None
    ) -> None:
        """Write a folder that holds all that mmpt does not ship: weights, codecs, recipe, card.

        The card is that of the folder it was opened from, where it has one; see `write_card`.
        Raises UserError where the folder cannot be written.
        """
        folder = Path(folder)
        save_model(self.model, self.processor, folder, codecs=True)
        if self.folder is not None and self.folder.resolve() != folder.resolve():
            if (self.folder / CARD).is_file():
                shutil.copyfile(self.folder / CARD, folder / CARD)
            if (recipe := find_recipe(self.folder)) is not None:
                write_atomic(folder / RECIPE, public_recipe(recipe.read_text()))
        write_card(folder, name=name, license=license)

    def push_to_hub(
        self,
        name: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        message: str = "Push with mmpt",
        token: str | None = None,
    ) -> str:
        """Put what `save_pretrained` writes on a hub as `owner/name`; the commit's address.

        revision: the branch. private, message, token: see `mmpt.hub.push`.
        """
        place = hub.HubName.of(name, revision)
        with TemporaryDirectory() as made:
            self.save_pretrained(made, name=place.repo, license=license)
            return hub.push(made, place, private=private, message=message, token=token)

    def __call__(
        self,
        *items: Given,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        cancel: Flag | None = None,
        **settings: Any,
    ) -> Result:
        """Fill the `Generate` slots among the items, each seeing what stands before it.

        items: parts (see `part_of` for what is taken as one), messages, slots. Without a slot there
        is one at the end, of medium `to`, and of what the model decides where that is None. begin,
        edit: see `Generate`. settings: fields of `Settings`, for slots that do not say otherwise.
        Raises UserError in one line for what cannot be done, Cancelled once `cancel` is set.
        """
        request = Request.of(items, to=to, begin=begin, edit=edit, seed=seed, settings=settings)
        [result] = self.answer([request], cancel=cancel)
        return result

    def stream(
        self,
        *items: Given,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        cancel: Flag | None = None,
        **settings: Any,
    ) -> Iterator[Event]:
        """As a call, but yields events while it works; the last one is the Result.

        It may be closed at any event. A flag that another thread sets stops it behind the pass that
        is running.
        """
        request = Request.of(items, to=to, begin=begin, edit=edit, seed=seed, settings=settings)
        for _, event in self._answer([request], cancel, show=True):
            yield event

    def answer(self, requests: Sequence[Request], *, cancel: Flag | None = None) -> list[Result]:
        """The results of complete requests, such as those that results hold, in their order.

        Those whose slots are alike are answered together; each gives what it gives alone.
        """
        results: dict[int, Result] = {}
        for group in _alike(requests):
            chosen = [requests[place] for place in group]
            for number, event in self._answer(chosen, cancel, show=False):
                if isinstance(event, Result):
                    results[group[number]] = event
        return [results[place] for place in range(len(requests))]

    def batch(
        self,
        prompts: Sequence[Sequence[Given]],
        *,
        to: Medium | None = None,
        begin: Sequence[Video | None] | None = None,
        seeds: Sequence[int],
        cancel: Flag | None = None,
        **settings: Any,
    ) -> list[Result]:
        """Many answers; prompt i with seed i (and clip i of `begin`) gives what a call gives."""
        clips = [None] * len(prompts) if begin is None else list(begin)
        if not len(prompts) == len(seeds) == len(clips):
            raise UserError(
                f"{len(prompts)} prompts need as many seeds and clips, not {len(seeds)} and "
                f"{len(clips)}"
            )
        requests = [
            Request.of(prompt, to=to, begin=clip, seed=int(seed), settings=settings)
            for prompt, clip, seed in zip(prompts, clips, seeds, strict=True)
        ]
        return self.answer(requests, cancel=cancel)

    def plan(
        self,
        *items: Given,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Plan:
        """What a call with the same arguments would take at most: ids, passes, bytes, seconds.

        Nothing is generated; the first plan measures for a moment how fast this model is here.
        """
        request = Request.of(items, to=to, begin=begin, edit=edit, seed=seed, settings=settings)
        engine = Engine(self.model, self.processor)
        with self._measuring:
            self._speed = self._speed or Speed.measure(engine)
        return plan_of(engine, request, self._speed)

    def _answer(
        self, requests: Sequence[Request], cancel: Flag | None, *, show: bool
    ) -> Iterator[tuple[int, Event]]:
        for tick in self.ticks(requests, show=show):
            done = tick is not None and isinstance(tick[1], Result)
            if cancel is not None and cancel.is_set() and not done:
                raise Cancelled("stopped, as was asked")
            if tick is not None:
                yield tick

    @torch.inference_mode()
    def ticks(
        self, requests: Sequence[Request], *, show: bool, pool: Pool | None = None
    ) -> Generator[Tick, None, None]:
        """Events of requests whose slots are alike (`likeness`), and None behind each pass.

        show: previews, too, which have to be decoded. pool: where passes are shared with others
        that are answered in turn.
        """
        engine = Engine(self.model, self.processor, pool)
        rows = [Row(request, self.processor, n) for n, request in enumerate(requests)]
        slots: list[Generate] = []
        while new := [slot for row in rows if (slot := row.advance()) is not None]:
            slots = new
            yield from _write(engine, rows, slots, show=show)
        for row, slot in zip(rows, slots, strict=True):
            yield row.number, stamp(self._result(row, slot, len(rows)), self)

    def _result(self, row: Row, slot: Generate, size: int) -> Result:
        ids = row.ids
        last = row.request.items[-1] is slot and row.made and row.made[-1]
        if slot.medium is not None and isinstance(last, Image | Video):
            ids = ids[:-1]  # a slot of one grid ends with its last code
        return Result(
            row.made,
            row.request.seed,
            slot.chosen,
            self.fingerprint,
            self.processor.vocabulary.fingerprint,
            ids,
            row.request,
            tuple(row.counts),
            (row.number, size),
        )


def _write(engine: Engine, rows: Sequence[Row], slots: Sequence[Generate], *, show: bool) -> Ticks:
    settings, medium = slots[0].chosen, slots[0].medium
    if slots[0].edit is not None and settings.decoder != "dida":
        raise UserError("an edit needs decoder='dida'")
    if medium is None:
        for row in rows:
            yield from Decision(engine, row, settings, show=show).write()
    elif medium == "text":
        yield from write_text(engine, rows, settings)
    elif medium == "speech" and slots[0].edit is None:
        yield from write_speech(engine, rows, settings)
    elif medium == "speech":
        for row, slot in zip(rows, slots, strict=True):
            yield from edit_speech(engine, row, slot)
    else:
        yield from write_grids(engine, rows, slots, show=show)


def _alike(requests: Sequence[Request]) -> list[list[int]]:
    """Places of requests that can be answered together."""
    groups: dict[Any, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(likeness(request) or place, []).append(place)
    return list(groups.values())


def likeness(request: Request) -> Hashable | None:
    """Equal of requests that can be answered together; None of those with edits."""
    if any(slot.edit is not None for slot in request.slots):
        return None
    shapes = [
        (s.medium, s.chosen, None if s.begin is None else s.begin.frames.shape)
        for s in request.slots
    ]
    return (request.spoken, *shapes)


def save_model(
    model: Decoder, processor: Processor, folder: str | Path, *, codecs: bool = False
) -> None:
    """Write a model folder that `Pipeline.load` opens. codecs: with those that are not shipped."""
    folder = Path(folder)
    model.save(folder)
    processor.vocabulary.save(folder / "vocabulary.json")
    processor.save_settings(folder, codecs=codecs)
