"""The main job on the embedded sampler: encode, pretrain, adapt, evaluate, generate, report.

Every stage writes into one run folder and is skipped when it is there, so Ctrl-C costs little and
the same command goes on. The number of training steps is measured once against `minutes`, then
kept, so that a resumed run is the run that was begun.
"""

import json
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mmpt
from mmpt import hub
from mmpt.config import UserError, load_recipe, write_atomic
from mmpt.data.encode import encode
from mmpt.data.shards import Document, Quarantine, read_documents
from mmpt.data.sources import sampler_shards
from mmpt.doctor import doctor, has_fast_bf16
from mmpt.eval.heldout import evaluate_model
from mmpt.eval.report import Gallery, Report, Stage, write_report
from mmpt.model.transformer import Decoder
from mmpt.pipeline import save_model
from mmpt.processor import DEFAULT_TOKENIZERS, Processor
from mmpt.showcase import Showcase
from mmpt.tokenizers.evaluate import list_tokenizers
from mmpt.train.adapt import adapt, adapter
from mmpt.train.loop import Trainer
from mmpt.train.pretrain import pretrainer, train
from mmpt.train.recipe import AdaptRecipe, RunRecipe, TrainRecipe, fit_model
from mmpt.train.result import TrainResult
from mmpt.vocab import Vocabulary

log = logging.getLogger(__name__)

R = TypeVar("R", bound=RunRecipe)

SHARES = {"pretrain": 0.85, "adapt": 0.15}  # of `minutes`


class Stopped(Exception):
    """A stage was asked to stop; what it did is on disk."""


def quickstart(*, out: Path = Path("runs/quickstart"), minutes: float = 7.5, seed: int = 0) -> dict:
    """Run the main job on the sampler: encode, pretrain, adapt, evaluate, generate, report.

    Ctrl-C stops cleanly; the same command goes on. `minutes` is the time to train for, from which
    the number of steps is measured. Look at OUT/report.html afterwards.
    """
    if not minutes > 0:
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
        self.state = _read_state(self.state_file)
        if self.state["begun"] != begun:
            raise UserError(
                f"{out} was begun with {self.state['begun']}, now it is {begun}; "
                "give the same values or another --out"
            )

    def run(self) -> dict[str, Any]:
        """All stages that are not done yet; returns what `--json` prints."""
        train_shards, heldout_shards = sampler_shards("train"), sampler_shards("heldout")
        with self.stage("encode"):
            self.encode([*train_shards, *heldout_shards])
        self.vocabulary = Vocabulary.load(self.tokens / "vocabulary.json")
        with self.stage("pretrain"):
            self.pretrain()
        with self.stage("adapt"):
            self.adapt()
        with self.stage("evaluate", repeats=True):
            self.evaluate()
        with self.stage("generate", repeats=True):
            galleries = self.generate(heldout_shards)
        with self.stage("report", repeats=True):
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
    def stage(self, name: str, *, repeats: bool = False) -> Iterator[None]:
        """Time a stage over all the runs it took; one that `repeats` begins anew each time."""
        entry = self.state["stages"].setdefault(name, {"seconds": 0.0, "detail": ""})
        entry["seconds"] = 0.0 if repeats else entry["seconds"]
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
        self._note_peak(_peak_gib(resource.RUSAGE_SELF))
        write_atomic(self.state_file, json.dumps(self.state, indent=1))

    def _note_peak(self, peak: float) -> None:
        self.state["peak_gib"] = max(self.state.get("peak_gib", 0.0), round(peak, 2))

    def encode(self, shards: list[Path]) -> None:
        """Raw shards -> token shards and the vocabulary."""
        names = [str(shard) for shard in shards]
        done = encode(names, out=self.tokens, tokenizers=DEFAULT_TOKENIZERS, augment=True)
        # each worker took no more than the largest
        self._note_peak(
            _peak_gib(resource.RUSAGE_SELF) + done["workers"] * _peak_gib(resource.RUSAGE_CHILDREN)
        )
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
            return pretrainer(recipe, folder, vocabulary=self.vocabulary)

        recipe = self._with_steps("pretrain", recipe, trial)
        done = train(recipe, self.out / "pretrain", vocabulary=self.vocabulary)
        self._finish(done, "ids")

    def adapt(self) -> None:
        """Teach the pretrained model to denoise blocks, then write the model folder."""
        recipe = replace(
            self._recipe(AdaptRecipe, "tiny-adapt.toml"), start=str(self.out / "pretrain")
        )

        def trial(folder: Path) -> Trainer:
            return adapter(recipe, folder, vocabulary=self.vocabulary)

        recipe = self._with_steps("adapt", recipe, trial)
        done = adapt(recipe, self.out / "adapt", vocabulary=self.vocabulary)
        self._finish(done, "clean ids")
        model = Decoder.load(done.checkpoint, vocabulary=self.vocabulary)
        processor = Processor.load(vocabulary=self.vocabulary)
        save_model(model, processor, self.model)

    def _finish(self, done: TrainResult, unit: str) -> None:
        if not done.finished:
            raise Stopped
        self.current["detail"] = f"{done.counters.step} steps, {done.counters.tokens:,} {unit}"

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
        self.fingerprint = pipeline.fingerprint
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
            if name != "report"
        ]
        runs = {"pretraining": self.out / "pretrain", "adaptation": self.out / "adapt"}
        return write_report(
            self.out / "report.html",
            Report(
                title="mmpt quickstart",
                command="mmpt quickstart --minutes {minutes:g} --seed {seed}".format(
                    **self.state["begun"]
                ),
                stages=stages,
                peak_gib=self.state["peak_gib"],
                heldout=self.heldout,
                curves={name: _rows(run / "metrics.jsonl") for name, run in runs.items()},
                codecs=list_tokenizers()["tokenizers"],
                data=self.state["data"],
                environment=doctor(),
                galleries=galleries,
                provenance={
                    "seed": self.seed,
                    "model": self.fingerprint,
                    "vocabulary": self.vocabulary.fingerprint,
                },
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

    def _with_steps(self, name: str, recipe: R, trial: Callable[[Path], Trainer]) -> R:
        """As many steps as fit the stage's share of the minutes; measured once, then kept."""
        steps = self.state.setdefault("steps", {})
        if name not in steps:
            with tempfile.TemporaryDirectory() as folder:
                seconds = trial(Path(folder)).time_step()
            wanted = self.state["begun"]["minutes"] * 60 * SHARES[name]
            steps[name] = max(4, round(wanted / seconds))
            self.save()
        warmup = min(recipe.optim.warmup, steps[name] // 5)
        return replace(recipe, steps=steps[name], optim=replace(recipe.optim, warmup=warmup))


def _peak_gib(who: int) -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(who).ru_maxrss * unit / 2**30


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text())
        if isinstance(state["begun"], dict) and isinstance(state["stages"], dict):
            return state
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{path} is no quickstart of mmpt; remove it or give another --out")


def _documents(shards: list[Path]) -> list[Document]:
    return list(read_documents(shards, Quarantine(None)))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
