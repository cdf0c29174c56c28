"""The drawer beside the conversation: what an answer is made of, and its files."""

import copy
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

from mmpt.config import UserError
from mmpt.demo.conversation import Answer
from mmpt.eval.page.stream import render
from mmpt.page.markup import facts, tag
from mmpt.pipeline import Pipeline
from mmpt.provenance import read_recording
from mmpt.results import Result
from mmpt.ribbon import look_at

MAX_KEPT = 256  # answers whose files can be fetched


class Inspector:
    """Its components, and what they show of an answer."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        model = pipeline.model
        # reading which experts are used hooks into modules, and answers may be under way: modules
        # of its own, which share their weights with those
        kept = {id(each): each for each in (*model.parameters(), *model.buffers())}
        self.pipeline = Pipeline(copy.deepcopy(model, kept), pipeline.processor)
        self.folder, self._lock = folder, Lock()

    def lay_out(self) -> None:
        """Inside of a `with`."""
        gr.HTML("<h2>Inspector</h2>")
        self.facts = gr.HTML("<p class='aside'>Choose Inspect below an answer.</p>")
        self.files = gr.File(
            label="Files; mmpt replay makes each of them again",
            file_count="multiple", interactive=False, visible=False, elem_id="files",
        )  # fmt: skip
        self.page = gr.HTML(elem_id="ribbon")
        with gr.Accordion("Settings and provenance", open=False, visible=False) as self.record_box:
            self.record = gr.JSON(show_label=False, open=True)

    @property
    def shown(self) -> list[Any]:
        """Components that `show` sets."""
        return [self.facts, self.files, self.page, self.record_box, self.record]

    def show(self, answer: Answer) -> dict[Any, Any]:
        """Of a finished answer. Raises UserError for another one."""
        if answer.result is None:
            raise UserError("only an answer that came to its end can be looked at")
        paths = self.save(answer.result)
        recording = read_recording(paths[-1])
        processor = self.pipeline.processor
        with self._lock:  # a pass notes the experts of one answer
            look = look_at(recording, self.pipeline, recording.content or [], "this answer")
        page = render(look, processor, "Answer")
        frame = tag("iframe", srcdoc=page, sandbox="", title="The ids of this answer")
        return {
            self.facts: tag("div", facts(_facts(answer), label="answer"), class_="sheet"),
            self.files: gr.update(value=[str(path) for path in paths], visible=True),
            self.page: frame,
            self.record_box: gr.update(visible=True),
            self.record: {
                "settings": asdict(answer.result.settings),
                "circumstances": asdict(recording.provenance.circumstances),
                "ids": [int(token) for token in answer.result.ids],
            },
        }

    def save(self, result: Result) -> list[Path]:
        """Its parts and its record, in a folder of its own, which no other visitor can guess."""
        folder = self.folder / "answers"
        with self._lock:
            kept = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime)
            for old in kept[: max(0, len(kept) + 1 - MAX_KEPT)]:
                shutil.rmtree(old, ignore_errors=True)
            return result.save(folder / secrets.token_hex(16))


def _facts(answer: Answer) -> dict[str, Any]:
    result = answer.result
    assert result is not None
    return {
        "decoder": answer.decoder,
        "seconds": round(answer.seconds, 2),
        "first after": round(answer.first, 2),
        "seed": str(result.seed),
        "ids": len(result.ids),
        "model": result.model,
        "vocabulary": result.vocabulary,
    }
