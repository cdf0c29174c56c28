"""The main job on the embedded sampler: encode, pretrain, adapt, evaluate, generate, report.

Every stage writes into one run folder and is skipped when it is there, so Ctrl-C costs little and
the same command goes on. The number of training steps is measured once against `minutes`, then
kept, so that a resumed run is the run that was begun.
"""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

import mmpt
from mmpt import hub
from mmpt.config import UserError, load_recipe, write_atomic
from mmpt.data.encode import encode
from mmpt.data.shards import Document, Quarantine, read_documents
from mmpt.doctor import doctor, has_fast_bf16
from mmpt.eval.heldout import evaluate_model
from mmpt.eval.report import Gallery, Report, Stage, write_report
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.pipeline import Pipeline, save_model
from mmpt.processor import DEFAULT_TOKENIZERS, Processor
from mmpt.tokenizers.evaluate import list_tokenizers
from mmpt.train.adapt import adapt
from mmpt.train.loop import Trainer, train
from mmpt.train.loss import NextToken
from mmpt.train.recipe import AdaptRecipe, RunRecipe, TrainRecipe, fit_model
from mmpt.vocab import Vocabulary

log = logging.getLogger(__name__)

SHARES = {"pretrain": 0.78, "adapt": 0.22}  # of `minutes`


class Stopped(Exception):
    """A stage was asked to stop; what it did is on disk."""


def quickstart(*, out: Path = Path("runs/quickstart"), minutes: float = 5.0, seed: int = 0) -> dict:
    """Run the main job on the embedded sampler: encode, pretrain, adapt, evaluate, generate, report.

    Ctrl-C stops cleanly; the same command goes on. `minutes` is the time to train for, from which
    the number of steps is measured. Look at OUT/report.html afterwards.
    """
    if minutes <= 0:
        raise UserError(f"minutes = {minutes}; use more than 0, such as 5")
    job = Job(Path(out), minutes=minutes, seed=seed)
    try:
        return job.run()
    except (Stopped, KeyboardInterrupt):
        job.save()
        log.warning("stopped; the same command goes on from here")
        return {"finished": False, "out": str(out), "exit_status": 130}


class Job:
    """The stages, and what they have cost so far."""

    def __init__(self, out: Path, *, minutes: float, seed: int) -> None:
        self.out, self.seed = out, seed
        self.tokens, self.model = out / "tokens", out / "model"
        self.state_file = out / "quickstart.json"
        begun = {"minutes": minutes, "seed": seed}
        if not self.state_file.is_file():
            write_atomic(self.state_file, json.dumps({"begun": begun, "stages": {}}))
        self.state = json.loads(self.state_file.read_text())
        if self.state["begun"] != begun:
            raise UserError(
                f"{out} was begun with {self.state['begun']}, now it is {begun}; "
                "give the same values or another --out"
            )

    def run(self) -> dict[str, Any]:
        """All stages that are not done yet; returns what `--json` prints."""
        train_shards, heldout_shards = _raw("train"), _raw("heldout")
        with self.stage("encode"):
            self.encode([*train_shards, *heldout_shards])
        self.vocabulary = Vocabulary.load(self.tokens / "vocabulary.json")
        with self.stage("pretrain"):
            self.pretrain()
        with self.stage("adapt"):
            self.adapt()
        with self.stage("evaluate"):
            self.evaluate()
        with self.stage("generate"):
            galleries = self.generate(heldout_shards)
        with self.stage("report"):
            report = self.report(galleries)
        stages = self.state["stages"]
        return {
            "finished": True,
            "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
            "peak_gib": self.state["peak_gib"],
            "report": str(report),
            "model": str(self.model),
            "stages": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
            "heldout": self.heldout,
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, over all the runs that it took."""
        entry = self.state["stages"].setdefault(name, {"seconds": 0.0, "detail": ""})
        self.current, began = entry, time.monotonic()
        log.info("%s ...", name)
        try:
            yield
        finally:
            entry["seconds"] += time.monotonic() - began
            self.save()
        log.info("%s: %.0f s; %s", name, entry["seconds"], entry["detail"])

    def save(self) -> None:
        """Keep what the stages have cost."""
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        self.state["peak_gib"] = max(self.state.get("peak_gib", 0.0), round(peak, 2))
        write_atomic(self.state_file, json.dumps(self.state, indent=1))

    def encode(self, shards: list[Path]) -> None:
        """Raw shards -> token shards and the vocabulary."""
        done = encode(shards, out=self.tokens, tokenizers=DEFAULT_TOKENIZERS)
        codes = ", ".join(f"{count:,} {name}" for name, count in done["codes"].items())
        self.current["detail"] = (
            f"{done['documents']:,} documents, {done['bad']} bad; {codes} codes"
        )
        self.state["data"] = {"documents": done["documents"], "bad": done["bad"], **done["codes"]}

    def pretrain(self) -> None:
        """Train the tiny recipe for its share of the minutes."""
        recipe = self._recipe(TrainRecipe, "tiny.toml")
        recipe = replace(recipe, model=fit_model(recipe.model, self.vocabulary))

        def trial(folder: Path) -> Trainer:
            model = Decoder.from_config(recipe.model, seed=self.seed)
            objective = NextToken(recipe.loss_weights, z_loss=recipe.z_loss)
            return Trainer(
                recipe, folder, model=model, vocabulary=self.vocabulary, objective=objective
            )

        steps = self._steps("pretrain", trial)
        done = train(
            replace(recipe, steps=steps), self.out / "pretrain", vocabulary=self.vocabulary
        )
        if not done.finished:
            raise Stopped
        self.current["detail"] = f"{steps} steps, {done.counters.tokens:,} ids"

    def adapt(self) -> None:
        """Teach the pretrained model to denoise blocks, then write the model folder."""
        recipe = self._recipe(AdaptRecipe, "tiny-adapt.toml")
        recipe = replace(recipe, start=str(self.out / "pretrain"))
        pretraining = self.state["stages"]["pretrain"]
        # a joint step costs about what a plain one does: frozen clean ids need no gradients
        per_step = pretraining["seconds"] / max(1, self.state["steps"]["pretrain"])
        seconds = self.state["begun"]["minutes"] * 60 * SHARES["adapt"]
        steps = self.state["steps"].setdefault("adapt", max(4, round(seconds / per_step / 1.2)))
        done = adapt(replace(recipe, steps=steps), self.out / "adapt", vocabulary=self.vocabulary)
        if not done.finished:
            raise Stopped
        model = Decoder.load(done.checkpoint, vocabulary=self.vocabulary)
        processor = Processor.load(vocabulary=self.vocabulary)
        save_model(model, processor, self.model, DEFAULT_TOKENIZERS)
        self.current["detail"] = f"{steps} steps, {done.counters.tokens:,} clean ids"

    def evaluate(self) -> None:
        """Held-out likelihoods beside their baselines."""
        self.heldout = evaluate_model(self.model, tokens=self.tokens)["heldout"]
        self.current["detail"] = ", ".join(
            f"{name} {row['nats']:.2f} of {row['unigram_nats']:.2f} nats"
            for name, row in self.heldout.items()
        )

    def generate(self, shards: list[Path]) -> list[Gallery]:
        """Every direction, from held-out documents."""
        pipeline = mmpt.load(str(self.model))
        shown = Showcase(pipeline, _documents(shards), seed=self.seed)
        galleries = shown.galleries()
        self.current["detail"] = (
            f"{shown.count} parts, {shown.seconds_of['ar']:.1f} s one id at a time, "
        )
        self.current["detail"] += f"{shown.seconds_of['dida']:.1f} s for as many media in parallel"
        return galleries

    def report(self, galleries: list[Gallery]) -> Path:
        """report.html."""
        self.save()
        stages = [
            Stage(name=name, seconds=s["seconds"], detail=s["detail"])
            for name, s in self.state["stages"].items()
        ]
        runs = {"pretraining": self.out / "pretrain", "adaptation": self.out / "adapt"}
        return write_report(
            self.out / "report.html",
            Report(
                title="mmpt quickstart",
                command=f"mmpt quickstart --minutes {self.state['begun']['minutes']:g} --seed {self.seed}",
                stages=stages,
                peak_gib=self.state["peak_gib"],
                heldout=self.heldout,
                curves={name: _rows(run / "metrics.jsonl") for name, run in runs.items()},
                codecs=list_tokenizers()["tokenizers"],
                data=self.state["data"],
                environment=doctor(),
                galleries=galleries,
                provenance={"seed": self.seed, "vocabulary": self.vocabulary.fingerprint},
            ),
        )

    def _recipe(self, kind: type, name: str) -> Any:
        overrides = [
            f"vocabulary={self.tokens / 'vocabulary.json'}",
            f"precision={'bf16' if has_fast_bf16() else 'fp32'}",
            f"seed={self.seed}",
        ]
        if kind is TrainRecipe:
            overrides.append("model.vocab_size=1")
        recipe: RunRecipe = load_recipe(kind, hub.shipped("recipes") / name, overrides)
        sources = {
            key: replace(
                source, shards=tuple(str(self.tokens / Path(s).name) for s in source.shards)
            )
            for key, source in recipe.data.sources.items()
        }
        return replace(recipe, data=replace(recipe.data, sources=sources))

    def _steps(self, name: str, trial: Callable[[Path], Trainer]) -> int:
        steps = self.state.setdefault("steps", {})
        if name not in steps:
            trainer = trial(self.out / "trial")
            seconds = []
            for _ in range(4):  # the first step is slower than the rest
                began = time.monotonic()
                trainer.step()
                seconds.append(time.monotonic() - began)
            wanted = self.state["begun"]["minutes"] * 60 * SHARES[name]
            steps[name] = max(4, round(wanted / min(seconds[1:])))
            self.save()
        return steps[name]


class Showcase:
    """What the report shows: each direction on held-out documents, autoregressive and in parallel."""

    def __init__(self, pipeline: Pipeline, documents: list[Document], *, seed: int) -> None:
        self.pipeline, self.documents, self.seed = pipeline, documents, seed
        self.count = 0
        self.seconds_of = {"ar": 0.0, "dida": 0.0}

    def galleries(self) -> list[Gallery]:
        """All galleries, with a progress bar."""
        makers = [
            self.text_to_image,
            self.image_to_text,
            self.text_to_speech,
            self.speech_to_text,
            self.next_frames,
            self.page_continued,
        ]
        return [maker() for maker in tqdm(makers, desc="generate", unit="gallery")]

    def text_to_image(self) -> Gallery:
        """Labels of held-out emoji as pictures, both decoders."""
        chosen = self._with(Image, 8)
        labels = [_first(d, Text).text for d in chosen]
        made = {
            decoder: self._batch(labels, "image", decoder=decoder, guidance=2.0)
            for decoder in ("ar", "dida")
        }
        rows: list[list[Any]] = [
            [label, ar, dida, self._codes(_first(d, Image)), _first(d, Image)]
            for d, label, ar, dida in zip(chosen, labels, made["ar"], made["dida"], strict=True)
        ]
        return Gallery(
            title="Text to image",
            text="Labels that the model never saw with a picture. One id at a time (64 passes), and all "
            "64 codes in parallel (8 passes); then the original through the codec, and the original.",
            columns=("label", "one id at a time", "in parallel", "codec", "original"),
            rows=rows,
        )

    def image_to_text(self) -> Gallery:
        """Held-out pictures named."""
        chosen = self._with(Image, 6)
        pictures = [_first(d, Image) for d in chosen]
        written = self._batch(pictures, "text", max_ids=24, temperature=0.7)
        rows: list[list[Any]] = [
            [picture, text, _first(d, Text)]
            for d, picture, text in zip(chosen, pictures, written, strict=True)
        ]
        return Gallery(
            title="Image to text",
            text="Held-out pictures, what the model writes, and what people call them.",
            columns=("picture", "model", "label"),
            rows=rows,
        )

    def text_to_speech(self) -> Gallery:
        """Held-out texts spoken."""
        chosen = self._with(Audio, 4)
        texts = [_first(d, Text).text for d in chosen]
        made = {d: self._batch(texts, "speech", decoder=d) for d in ("ar", "dida")}
        rows: list[list[Any]] = [
            [text, ar, dida, self._codes(_first(d, Audio)), _first(d, Audio)]
            for d, text, ar, dida in zip(chosen, texts, made["ar"], made["dida"], strict=True)
        ]
        return Gallery(
            title="Text to speech",
            text="Held-out texts. 12.5 codes a second; spans of at most 26 codes are denoised in parallel.",
            columns=("text", "one id at a time", "in parallel", "codec", "original"),
            rows=rows,
        )

    def speech_to_text(self) -> Gallery:
        """Held-out speech transcribed."""
        chosen = self._with(Audio, 4)
        sounds = [_first(d, Audio) for d in chosen]
        written = self._batch(sounds, "text", max_ids=24, temperature=0.7)
        rows: list[list[Any]] = [
            [sound, text, _first(d, Text)]
            for d, sound, text in zip(chosen, sounds, written, strict=True)
        ]
        return Gallery(
            title="Speech to text",
            text="Held-out recordings, what the model writes, and what was said.",
            columns=("speech", "model", "transcript"),
            rows=rows,
        )

    def next_frames(self) -> Gallery:
        """Held-out clips continued from their first nine frames."""
        rows: list[list[Any]] = []
        for number, document in enumerate(self._with(Video, 4)):
            clip, label = _first(document, Video), _first(document, Text)
            begin = Video(clip.frames[:9], clip.fps)
            made = [
                Video(self._one(label, "video", number, begin=begin, decoder=d).frames, clip.fps)  # type: ignore[union-attr] # a video was asked for
                for d in ("ar", "dida")
            ]
            rows.append([label, begin, *made, clip])
        return Gallery(
            title="The next frames of a video",
            text="The first nine frames of held-out clips are given; the model makes the next eight.",
            columns=("label", "given", "one id at a time", "in parallel", "original"),
            rows=rows,
        )

    def page_continued(self) -> Gallery:
        """A held-out page continued with text and pictures."""
        pages = [d for d in self.documents if d.order == "fixed"][:2]
        rows: list[list[Any]] = []
        for number, page in enumerate(pages):
            given = page.parts[:1]
            if isinstance(given[0], Text):
                given = [Text(given[0].text[:400])]
            done = self.pipeline(*given, seed=self.seed + number, max_ids=240, temperature=0.8)
            self.count += len(done)
            rows.append([given, done.parts])
        return Gallery(
            title="A page continued",
            text="The beginning of a held-out page of a handbook, and what the model goes on with.",
            columns=("given", "continued"),
            rows=rows,
        )

    def _with(self, kind: type, count: int) -> list[Document]:
        """The first documents in any order that hold a part of this kind and a text."""
        found = [
            d
            for d in self.documents
            if d.order == "any" and any(isinstance(p, kind) for p in d.parts)
        ]
        step = max(1, len(found) // count)  # spread over the set
        return found[::step][:count]

    def _codes(self, part: Part) -> Part:
        processor = self.pipeline.processor
        return processor.decode_segments(processor.encode_parts([part]))[0]

    def _batch(self, prompts: list[Any], to: Any, **settings: Any) -> list[Part]:
        began = time.monotonic()
        seeds = [self.seed + i for i in range(len(prompts))]
        done = self.pipeline.batch([[p] for p in prompts], to=to, seeds=seeds, **settings)
        self._count(len(done), to, settings, began)
        return [result[0] for result in done]

    def _one(self, prompt: Part, to: Any, number: int, **settings: Any) -> Part:
        began = time.monotonic()
        [part] = self.pipeline(prompt, to=to, seed=self.seed + number, **settings)
        self._count(1, to, settings, began)
        return part

    def _count(self, count: int, to: str, settings: dict[str, Any], began: float) -> None:
        self.count += count
        if to != "text":
            self.seconds_of[settings["decoder"]] += time.monotonic() - began


def _raw(split: str) -> list[Path]:
    shards = sorted(hub.shipped("data/sampler").glob(f"*-{split}-*.tar"))
    if not shards:
        raise UserError(f"this installation holds no {split} shards; reinstall mmpt")
    return shards


def _documents(shards: list[Path]) -> list[Document]:
    return list(read_documents(shards, Quarantine(None)))


def _first(document: Document, kind: type) -> Any:
    return next(part for part in document.parts if isinstance(part, kind))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
