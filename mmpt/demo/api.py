"""The demo for programs: named endpoints, which `gradio_client` calls.

client = Client("http://127.0.0.1:7860")
made = client.predict("Draw a red apple.", answer="image", api_name="/generate")
again = client.predict(handle_file("cat.png"), "0,0,32,32", api_name="/edit")
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.events import api

from mmpt.config import UserError
from mmpt.demo.conversation import Answer, Answers, Conversation, Form, Turn
from mmpt.demo.inspector import Inspector
from mmpt.demo.limits import Limits, check_settings, check_text, read_files
from mmpt.demo.render import KINDS
from mmpt.edit import parse_edit
from mmpt.parts import Part, Text
from mmpt.pipeline import Pipeline
from mmpt.results import Method

Slot = Literal["any", "text", "image", "speech", "video"]


class Api:
    """Endpoints over one model; each request is a conversation of its own."""

    def __init__(
        self,
        model: Answers,
        pipeline: Pipeline,
        inspector: Inspector,
        limits: Limits,
        folder: Path,
    ) -> None:
        self.model, self.pipeline, self.inspector = model, pipeline, inspector
        self.limits, self.folder = limits, folder.resolve()

    def lay_out(self) -> None:
        """Inside of a `with gr.Blocks()`."""
        shared: Any = {"concurrency_limit": self.limits.answers, "concurrency_id": "answer"}
        api(self.generate, api_name="generate", **shared)
        api(self.edit, api_name="edit", **shared)
        api(self.plan, api_name="plan", **shared)

    def generate(
        self,
        text: str,
        files: list[gr.FileData] = [],  # noqa: B006 # Gradio shows defaults as they are
        answer: Slot = "any",
        decoder: Method = "ar",
        seed: int = -1,
        form: Form = "conversation",
        settings: dict[str, Any] = {},  # noqa: B006
    ) -> Iterator[dict[str, Any]]:
        """Answer a text and files with a part of one kind, or with what the model decides.

        Comes again and again while it works: {"done": false, "parts", "passes"}; the last one has
        "done": true, the files of all parts, and "record", which `mmpt replay` takes.
        seed -1: another one each time. settings: as of mmpt generate --setting.
        """
        with spoken():
            asked = self._asked(text, files)
            turn = self._turn(asked, answer, form, seed, settings)
            yield from self._answer(turn, decoder)

    def edit(
        self, file: gr.FileData, redo: str, text: str = "", seed: int = -1
    ) -> Iterator[dict[str, Any]]:
        """Make a region of a file anew: redo is TOP,LEFT,HEIGHT,WIDTH in pixels, or START,STOP in
        seconds; text says what of it is wanted. Comes as of /generate.
        """
        with spoken():
            [part] = read_files(self._paths([file]), self.limits)
            asked: list[Part] = [check_text(text, self.limits)] if text else []
            turn = self._turn(asked, "any", "conversation", seed, {})
            turn.edit = parse_edit(part, redo)
            yield from self._answer(turn, "dida")

    def plan(
        self,
        text: str,
        files: list[gr.FileData] = [],  # noqa: B006
        answer: Slot = "any",
        settings: dict[str, Any] = {},  # noqa: B006
    ) -> dict[str, Any]:
        """What /generate would take at most: ids, passes, bytes, seconds."""
        with spoken():
            asked = self._asked(text, files)
            turn = self._turn(asked, answer, "document", 0, settings)
            return self.pipeline.plan(*asked, to=turn.to, **turn.settings).to_json()

    def _asked(self, text: str, files: Any) -> list[Part]:
        asked = read_files(self._paths(files), self.limits)
        return [*asked, *([check_text(text, self.limits)] if text else [])]

    def _paths(self, files: Any) -> list[Path]:
        paths = []
        for file in files if isinstance(files, list) else [None]:
            name = file.get("path") if isinstance(file, Mapping) else None
            path = Path(name).resolve() if isinstance(name, str) and "\0" not in name else None
            if path is None or not path.is_relative_to(self.folder):
                raise UserError("files are uploaded; give them by handle_file(PATH)")
            paths.append(path)
        return paths

    def _turn(self, asked: list[Part], answer: Any, form: Any, seed: Any, settings: Any) -> Turn:
        if answer not in (*KINDS.values(), "any"):
            raise UserError(f"answer = {answer!r}; use any, {', '.join(KINDS.values())}")
        if form not in ("conversation", "document"):
            raise UserError(f"form = {form!r}; use conversation or document")
        if type(seed) is not int or not isinstance(settings, Mapping):
            raise UserError("seed is a whole number, and settings are a dictionary")
        return Turn(
            number=0,
            asked=asked,
            to=None if answer == "any" else answer,
            seed=secrets.randbelow(1_000_000) if seed < 0 else seed,
            form=form,
            settings=check_settings(settings, self.limits),
        )

    def _answer(self, turn: Turn, decoder: Method) -> Iterator[dict[str, Any]]:
        answer, passes = None, None
        for _ in Conversation().answer(self.model, turn, [decoder], self.limits):
            answer = turn.answers[0]
            # what can be seen of an answer changes with its passes and its parts, and rarely else
            now = (*answer.progress, len(answer.parts))
            if now != passes:
                passes = now
                made = [KINDS[type(part)] for part in answer.parts]
                yield {"done": False, "parts": made, "passes": list(answer.progress)}
        answer = turn.answers[0]
        if answer.result is None:
            raise UserError(answer.note)
        yield self._report(answer)

    def _report(self, answer: Answer) -> dict[str, Any]:
        assert answer.result is not None
        *paths, record = self.inspector.save(answer.result)
        parts = []
        for part, path in zip(answer.parts, paths, strict=True):
            said = {"text": part.text} if isinstance(part, Text) else {"file": _file(path)}
            parts.append({"type": KINDS[type(part)]} | said)
        return {
            "done": True,
            "parts": parts,
            "seconds": answer.seconds,
            "first": answer.first,
            "record": _file(record),
        } | answer.result.provenance()


@contextmanager
def spoken() -> Iterator[None]:
    """A UserError inside of the `with` becomes what Gradio hands to the caller."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _file(path: Path) -> dict[str, Any]:
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()
