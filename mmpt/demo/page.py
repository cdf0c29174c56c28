"""The page: what stands where, and what each control does."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from gradio.themes import Base
from starlette.middleware import Middleware

from mmpt.config import UserError
from mmpt.demo.api import Api, spoken
from mmpt.demo.conversation import Answers, Conversation, Turn, Visitors
from mmpt.demo.easel import read_edit, read_place, render_easel
from mmpt.demo.examples import Example, list_examples
from mmpt.demo.guard import Guard
from mmpt.demo.inspector import Inspector
from mmpt.demo.limits import Limits, check_settings, check_text, read_files, read_seed
from mmpt.demo.render import render_error, render_turn, render_turns
from mmpt.demo.sound import Heard, lay_out_player
from mmpt.pipeline import Pipeline
from mmpt.results import AudioChunk, Medium, Method, Settings

HERE = Path(__file__).parent
KINDS = [("Any", "any"), *((name.capitalize(), name) for name in get_args(Medium))]
EVERY = 0.08  # seconds between two looks at what changes
ON_PARTS = "window.mmpt.acts(element, trigger);"
ON_EASEL = "window.mmpt.easel(element, trigger);"
Updates = dict[Any, Any]


class Page:
    """Components and what they do, for one model."""

    def __init__(
        self, model: Answers, pipeline: Pipeline, limits: Limits, folder: Path, title: str
    ) -> None:
        self.model, self.pipeline, self.limits = model, pipeline, limits
        self.visitors = Visitors(limits)
        self.inspector = Inspector(pipeline, folder)
        config = pipeline.model.config
        adapted = any(group.noisy for group in config.groups.values())
        self.text_in_parallel = adapted and bool(config.noise.text_block)
        self.decoders: list[tuple[str, str]] = [("One by one", "ar")]
        if adapted:
            self.decoders += [("In parallel", "dida"), ("Both", "both")]
        self.examples = list_examples(pipeline)
        self._lay_out(title)
        self._connect()

    def _lay_out(self, title: str) -> None:
        gr.HTML((HERE / "head.html").read_text("utf-8").replace("$model", title), elem_id="top")
        with gr.Column(elem_id="talk"):
            self.history = gr.HTML(elem_id="history", js_on_load=ON_PARTS)
            self.live = gr.HTML(elem_id="live", js_on_load=ON_PARTS)
            with gr.Column(elem_id="start") as self.start:
                gr.HTML((HERE / "start.html").read_text("utf-8"))
                with gr.Row(elem_id="examples"):
                    self.chips = [gr.Button(e.label, elem_classes="chip") for e in self.examples]
            self.player = lay_out_player()
        with gr.Column(elem_id="ask"):
            self.redo = gr.HTML(elem_id="redo", visible=False, js_on_load=ON_EASEL)
            with gr.Row(elem_id="choices"):
                self.kind = gr.Radio(KINDS, value="any", label="Answer with", elem_id="kind")
                self.decoder = gr.Radio(
                    self.decoders, value=self.decoders[-1 if len(self.decoders) == 1 else 1][1],
                    label="Decoder", elem_id="decoder",
                )  # fmt: skip
            self.composer = gr.MultimodalTextbox(
                sources=["upload", "microphone"],
                file_count="multiple",
                placeholder="Write, record, or add a picture, a sound or a clip",
                label="Message",
                show_label=False,
                autofocus=True,
                max_plain_text_length=self.limits.characters,
                elem_id="composer",
            )
            fetch_nothing(self.composer)
            with gr.Accordion("Settings", open=False, elem_id="settings"):
                self._lay_out_settings()
        with gr.Sidebar(position="right", open=False, width=460, elem_id="drawer") as self.drawer:
            self.inspector.lay_out()

    def _lay_out_settings(self) -> None:
        known, most = Settings(), self.limits
        with gr.Row():
            self.seed = gr.Textbox(
                label="Seed", placeholder="another one each time", max_lines=1, elem_id="seed"
            )
            self.form = gr.Radio(
                [("Conversation", "conversation"), ("Document", "document")], value="conversation",
                label="Written as", info="a document has no turns: the model goes on with it",
            )  # fmt: skip
        with gr.Row():
            self.controls = {
                "temperature": gr.Slider(0.1, 2, known.temperature, step=0.05, label="Temperature"),
                "top_p": gr.Slider(0.05, 1, known.top_p, step=0.05, label="Top-p"),
                "guidance": gr.Slider(1, 8, known.guidance, step=0.25, label="Guidance"),
                "num_passes": gr.Slider(
                    1, most.num_passes, known.num_passes, step=1, label="Passes in parallel"
                ),
                "height": gr.Slider(16, 128, known.height, step=16, label="Height, pixels"),
                "width": gr.Slider(16, 128, known.width, step=16, label="Width, pixels"),
                "frames": gr.Slider(5, most.frames_made, known.frames, step=4, label="Frames"),
                "max_seconds": gr.Slider(
                    0.5, most.max_seconds, known.max_seconds, step=0.5, label="Seconds at most"
                ),
                "max_ids": gr.Slider(8, most.max_ids, known.max_ids, step=8, label="Ids at most"),
            }
        self.new = gr.Button("New conversation", size="sm", elem_id="new")

    def _connect(self) -> None:
        shown = [self.composer, self.history, self.live, self.start, self.player]
        choices = [self.kind, self.decoder, self.form, self.seed, *self.controls.values()]
        private: Any = {"api_visibility": "private", "show_progress": "hidden"}
        long: Any = private | {"concurrency_limit": self.limits.answers, "concurrency_id": "answer"}
        gr.on([self.composer.submit], self._send, [self.composer, *choices], shown, **long)
        for chip, example in zip(self.chips, self.examples, strict=True):
            chip.click(self._runner(example), choices, shown, **long)
        self.composer.stop(self._stop, None, None, queue=False, **private)
        acted = [self.drawer, self.redo, *self.inspector.shown]
        self.history.select(self._act, None, acted, **private)
        self.redo.select(lambda: gr.update(visible=False), None, self.redo, **private)
        self.redo.submit(self._make_anew, choices, [*shown, self.redo], **long)
        self.new.click(self._begin_anew, None, shown, queue=False, **private)

    def _send(self, request: gr.Request, value: Any, *choices: Any) -> Iterator[Updates]:
        text, files = (value or {}).get("text") or "", (value or {}).get("files") or []
        try:
            parts = read_files([Path(file) for file in files], self.limits)
            if text.strip():
                parts.append(check_text(text.strip(), self.limits))
            if not parts:
                raise UserError("write something, record it, or add a file")
            turn, decoders = self._turn(parts, *choices)
            yield from self._answer(self._conversation(request), turn, decoders)
        except UserError as error:
            yield {self.live: render_error(str(error)), self.composer: _resting(value)}

    def _runner(self, example: Example) -> Callable[..., Iterator[Updates]]:
        def run(request: gr.Request, *choices: Any) -> Iterator[Updates]:
            _, decoder, _, *rest = choices
            try:
                turn, decoders = self._turn(
                    list(example.parts), example.to, decoder, example.form, *rest
                )
                yield from self._answer(self._conversation(request), turn, decoders)
            except UserError as error:
                yield {self.live: render_error(str(error))}

        return run

    def _turn(
        self, parts: list[Any], kind: str, decoder: str, form: Any, seed: Any, *values: Any
    ) -> tuple[Turn, list[Method]]:
        given = dict(zip(self.controls, values, strict=True))
        whole = ("height", "width", "frames", "num_passes", "max_ids")
        given = {k: int(v) if k in whole else float(v) for k, v in given.items()}
        settings = check_settings(given, self.limits)
        chosen = read_seed(seed)
        decoders: list[Any] = ["ar", "dida"] if decoder == "both" else [decoder]
        to: Any = None if kind == "any" else kind
        if to == "text" and not self.text_in_parallel:
            decoders = ["ar"]  # which writes it, whatever was chosen
        turn = Turn(number=0, asked=parts, to=to, seed=chosen, form=form, settings=settings)
        return turn, decoders

    def _answer(
        self, conversation: Conversation, turn: Turn, decoders: list[Method]
    ) -> Iterator[Updates]:
        before, sound = render_turns(conversation.turns), Heard(turn)
        events = conversation.answer(self.model, turn, decoders, self.limits)
        last = due = 0.0
        for event in events:
            now = time.perf_counter()
            if not last:
                busy = gr.update(value=None, submit_btn=False, stop_btn=True)
                start = gr.update(visible=False)
                yield {self.composer: busy, self.history: before, self.start: start}
            if now < due and not isinstance(event, AudioChunk):
                continue
            update: Updates = {self.live: render_turn(turn)}
            # the model waits while it is shown: a fifth of the time at most
            last = time.perf_counter()
            due = last + max(EVERY, 4 * (last - now))
            if isinstance(event, AudioChunk):
                update[self.player] = sound.push(event.wave, event.sample_rate)
            yield update
        yield {
            self.history: render_turns(conversation.turns),
            self.live: "",
            self.composer: _resting(),
        }

    def _conversation(self, request: gr.Request) -> Conversation:
        return self.visitors.find(str(request.session_hash))

    def _stop(self, request: gr.Request) -> None:
        self._conversation(request).stop()

    def _act(self, event: gr.EventData, request: gr.Request) -> Updates:
        """A button below a part."""
        conversation = self._conversation(request)
        with spoken():
            number, answer, part = read_place(event._data)
            if event._data["act"] == "redo":
                found = conversation.find_part(number, answer, part)
                easel = render_easel(found, event._data["part"])
                return {self.redo: gr.update(value=easel, visible=True)}
            shown = self.inspector.show(conversation.find(number, answer))
        return {self.drawer: gr.update(open=True), **shown}

    def _make_anew(
        self, event: gr.EventData, request: gr.Request, *choices: Any
    ) -> Iterator[Updates]:
        """What was painted over, or a stretch of a sound."""
        conversation, data = self._conversation(request), event._data
        with spoken():
            found = conversation.find_part(*read_place(data))
            turn, _ = self._turn([], "any", "dida", *choices[2:])
            turn.edit = read_edit(found, data)
            if text := str(data.get("text", "")).strip():
                turn.asked = [check_text(text, self.limits)]
            yield {self.redo: gr.update(visible=False)}
            yield from self._answer(conversation, turn, ["dida"])

    def _begin_anew(self, request: gr.Request) -> Updates:
        self.leave(request)
        return {self.history: "", self.live: "", self.start: gr.update(visible=True)}

    def leave(self, request: gr.Request) -> None:
        """The tab was closed: what is being answered ends."""
        self.visitors.forget(str(request.session_hash))


def build(
    model: Answers, pipeline: Pipeline, limits: Limits, folder: Path, *, title: str
) -> gr.Blocks:
    """The page and its endpoints, which are not served yet. model: what answers."""
    with gr.Blocks(title="mmpt", analytics_enabled=False, delete_cache=(300, 1800)) as blocks:
        page = Page(model, pipeline, limits, folder, title)
        blocks.unload(page.leave)
        Api(model, pipeline, page.inspector, limits, folder).lay_out()
    return blocks.queue(max_size=limits.queue, default_concurrency_limit=limits.answers)


def launch(
    blocks: gr.Blocks, limits: Limits, folder: Path, *, host: str, port: int, browser: bool
) -> None:
    """Serve it from a thread of its own."""
    script = (HERE / "page.js").read_text("utf-8")
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        max_file_size=limits.upload,
        allowed_paths=[str(folder)],
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Guard, limits=limits, folder=folder)]},
        footer_links=[],
        theme=Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=[HERE / "page.css"],
        head=f"<script>{script}</script>",
    )


def close(blocks: gr.Blocks) -> None:
    """End it, whatever is under way: pages that are open would be waited for."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it says what it cuts off
    blocks.server.config.timeout_graceful_shutdown = 1
    blocks.close(verbose=False)


def fetch_nothing(box: gr.MultimodalTextbox) -> None:
    """Gradio would fetch an address that stands where an uploaded file should."""
    move = box.async_move_resource_to_block_cache

    async def move_uploaded(url_or_file_path: str | Path | None) -> str | None:
        if "://" in str(url_or_file_path or ""):
            raise gr.Error("files are uploaded; addresses are not read", print_exception=False)
        return await move(url_or_file_path)

    box.async_move_resource_to_block_cache = move_uploaded  # of this one alone


def _resting(value: Any = None) -> Any:
    text = (value or {}).get("text") or None
    return gr.update(value=text, submit_btn=True, stop_btn=False)
