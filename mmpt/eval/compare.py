"""`mmpt eval --compare ar,dida`: is parallel decoding as good as one id at a time?

Equal numbers of samples for the same held-out prompts, by each way to decode, and tests of
non-inferiority with margins that the recipe fixes (`gate_stats` says how). A metric counts only if
it can tell good from bad here: the reference's own samples beside other prompts must come out as
inferior, and so must samples that are planted: the candidate's settings with one pass.
"""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from mmpt.config import UserError, load_recipe, write_atomic
from mmpt.data.tokens import open_shards
from mmpt.doctor import doctor
from mmpt.eval.gate_inception import WIDTH, Inception
from mmpt.eval.gate_metrics import (
    Accuracy,
    CodeEntropy,
    DistinctCodes,
    FeatureDistance,
    FrechetFeatures,
    KernelFeatures,
    Likelihood,
    Metric,
    Pictures,
    SpokenErrors,
    sayable,
)
from mmpt.eval.gate_page import render_gate
from mmpt.eval.gate_pictures import PictureJudge, picture_judge
from mmpt.eval.gate_recipe import GateRecipe
from mmpt.eval.gate_samples import System, draw_system, find_prompts, mean_seconds, real_system
from mmpt.eval.gate_stats import Margin, Outcome, Verdict, noninferiority, value
from mmpt.eval.passes import Passes
from mmpt.pipeline import Pipeline
from mmpt.results import Medium, Settings
from mmpt.tokenizers.cards.system import require
from mmpt.tokenizers.judge import GrammarJudge, WhisperJudge
from mmpt.vocab import Modality

ONE_PASS, SHUFFLED = "one pass", "shuffled prompts"


def compare_decoders(
    model: Path, overrides: Sequence[str], *, tokens: Path, names: str, recipe: Path, out: Path
) -> dict[str, Any]:
    """Run the gate of a recipe; returns what gate.json holds, and the page's place.

    names: of tables of the recipe, with commas; the first one is the reference of all others.
    """
    gate = load_recipe(GateRecipe, recipe, overrides)
    chosen = _chosen(gate, names)
    pipeline = Pipeline.load(model)
    words = ["mmpt", "eval", str(model), *overrides, "--tokens", str(tokens), "--compare", names]
    command = shlex.join([*words, "--recipe", str(recipe), "--out", str(out)])
    about = {
        "model": str(model),
        "fingerprint": pipeline.fingerprint,
        "settings": {name: asdict(settings) for name, settings in chosen.items()},
        "margins": asdict(gate.margins),
        "seed": gate.seed,
        "command": command,
    }
    environment = doctor()
    found: dict[str, Any] = {}
    shown: dict[str, list[System]] = {}
    for medium in gate.prompts:
        comparison = Comparison(gate, pipeline, cast(Medium, medium), chosen, tokens, out)
        found[medium] = comparison.run()
        shown[medium] = comparison.systems
        result = {**about, "media": found, "environment": environment}
        write_atomic(out / "gate.json", json.dumps(result, indent=1))
        write_atomic(out / "gate.html", render_gate(result, shown, gate.num_shown))
    return {**about, "media": found, "page": str(out / "gate.html")}


class Comparison:
    """The gate of one medium."""

    def __init__(
        self,
        gate: GateRecipe,
        pipeline: Pipeline,
        medium: Medium,
        chosen: dict[str, Settings],
        tokens: Path,
        out: Path,
    ) -> None:
        self.gate, self.pipeline, self.out = gate, pipeline, out
        self.medium: Medium = medium
        self.chosen, self.reference = chosen, next(iter(chosen))
        self.modality = Modality[medium.upper()]
        self.skipped: dict[str, str] = {}  # metric -> why it is not there
        vocabulary = pipeline.processor.vocabulary
        shards = open_shards([tokens / name for name in gate.prompts[medium]], vocabulary)
        self.prompts = find_prompts(
            [document for shard in shards for document in shard],
            pipeline.processor,
            medium,
            count=gate.num_prompts,
            given_frames=gate.given_frames,
        )
        if medium == "speech":
            self.prompts = self._sayable()
        if len(self.prompts) < 2:
            raise UserError(
                f"{tokens} has {len(self.prompts)} held-out prompts for {medium}; two are the least"
            )
        wanted = medium == "image" and gate.inception
        self.inception = Inception(gate.inception) if wanted else None
        self.systems: list[System] = []

    def run(self) -> dict[str, Any]:
        """Draw what is missing, measure, and judge."""
        systems = {name: self._draw(name, each) for name, each in self.chosen.items()}
        planted = next(each for name, each in self.chosen.items() if name != self.reference)
        one_pass = self._draw(ONE_PASS, replace(planted, decoder="dida", num_passes=1))
        real = real_system(self.prompts, self.pipeline.processor)
        self.systems = [*systems.values(), one_pass, real]
        controls = {SHUFFLED: systems[self.reference].shuffled(), ONE_PASS: one_pass}
        rows = [self._row(metric, systems, controls, real) for metric in self._metrics(real)]
        candidates = [name for name in systems if name != self.reference]
        return {
            "prompts": len(self.prompts),
            "samples": len(self.prompts) * self.gate.num_samples,
            "verdicts": {name: roll_up(rows, name) for name in candidates},
            "metrics": rows,
            "skipped": self.skipped,
            "seconds_per_sample": {
                name: round(seconds, 4)
                for name, seconds in mean_seconds([*systems.values(), one_pass])
            },
        }

    def _draw(self, name: str, settings: Settings) -> System:
        return draw_system(
            name,
            self.pipeline,
            settings,
            self.prompts,
            self.medium,
            folder=self.out / "samples",
            num_samples=self.gate.num_samples,
            seed=self.gate.seed,
        )

    def _metrics(self, real: System) -> list[Metric]:
        margins, processor = self.gate.margins, self.pipeline.processor
        vocabulary, passes = processor.vocabulary, Passes(self.pipeline.model, processor.vocabulary)
        likelihood = Margin(size=margins.likelihood, relative=True)
        entropy = Margin(size=margins.entropy, relative=True, higher_is_better=True)
        distinct = Margin(size=margins.distinct, relative=True, higher_is_better=True)
        return [
            Likelihood(
                passes=passes,
                vocabulary=vocabulary,
                separator=processor.separator,
                margin=likelihood,
            ),
            *(self._of_speech() if self.medium == "speech" else self._of_pictures(real)),
            *(self._of_inception(self.inception, real) if self.inception else ()),
            CodeEntropy(vocabulary=vocabulary, modality=self.modality, margin=entropy),
            DistinctCodes(margin=distinct),
        ]

    def _of_pictures(self, real: System) -> list[Metric]:
        gate, margins = self.gate, self.gate.margins
        if not gate.pictures or not gate.classes:
            self.skipped["pictures"] = (
                "the recipe names no pictures and classes to train a judge on"
            )
            return []
        judge: PictureJudge = picture_judge(
            gate.pictures, gate.classes, epochs=gate.epochs, seed=gate.seed, folder=self.out
        )
        pictures = Pictures(eye=judge)
        features = Margin(size=margins.features, relative=True)
        found: list[Metric] = [
            FeatureDistance(pictures=pictures, real=real, margin=features),
            KernelFeatures(pictures=pictures, real=real, margin=Margin(size=margins.kernel)),
        ]
        if self.medium == "image":
            accuracy = Margin(size=margins.accuracy, higher_is_better=True)
            found.append(Accuracy(judge=judge, margin=accuracy))
        return found

    def _of_inception(self, inception: Inception, real: System) -> list[Metric]:
        pictures, margins = Pictures(eye=inception, unit=False), self.gate.margins
        return [
            FrechetFeatures(
                pictures=pictures,
                real=real,
                margin=Margin(size=margins.frechet, relative=True),
                name="FID, InceptionV3",
                unit="squared, of few pictures",
            ),
            KernelFeatures(
                pictures=pictures,
                real=real,
                margin=Margin(size=margins.inception),
                scale=1 / WIDTH,
                name="KID, InceptionV3",
                unit="squared, of few pictures",
            ),
        ]

    def _sayable(self) -> list[Any]:
        try:
            require("jiwer")
            return sayable(self.prompts, whisper=self.gate.whisper)
        except UserError as error:
            self.skipped["word errors"] = str(error)
            return self.prompts

    def _of_speech(self) -> list[Metric]:
        if "word errors" in self.skipped:
            return []
        texts, whisper = [prompt.texts[0] for prompt in self.prompts], self.gate.whisper
        recogniser = WhisperJudge(whisper) if whisper else GrammarJudge(texts)
        return [
            SpokenErrors(recogniser=recogniser, margin=Margin(size=self.gate.margins.word_errors))
        ]

    def _row(
        self, metric: Metric, systems: dict[str, System], controls: dict[str, System], real: System
    ) -> dict[str, Any]:
        """One metric: values, tests of the candidates, and whether the controls are rejected."""
        reference = metric.measure(systems[self.reference])

        def test(system: System) -> Outcome:
            return noninferiority(
                reference, metric.measure(system), metric.margin, seed=self.gate.seed
            )

        tests = {name: test(each) for name, each in systems.items() if name != self.reference}
        planted = {name: test(each) for name, each in controls.items()}
        why = why_not(planted)
        values = {self.reference: value(reference)}
        values |= {name: outcome.candidate for name, outcome in (tests | planted).items()}
        values["real"] = value(metric.measure(real))
        return {
            "metric": metric.name,
            "unit": metric.unit,
            "guard": metric.guard,
            "margin": asdict(metric.margin),
            "values": {name: _plain(number) for name, number in values.items()},
            "tests": {name: _rounded(outcome) for name, outcome in tests.items()},
            "controls": {name: _rounded(outcome) for name, outcome in planted.items()},
            "counts": not metric.guard and not why,
            "why_not": "" if metric.guard else why,
        }


def why_not(controls: dict[str, Outcome]) -> str:
    """Why a metric cannot tell here; empty where it can."""
    reasons = []
    if controls[SHUFFLED].verdict != "inferior":
        reasons.append("other prompts do not make the reference's samples worse by the margin")
    if controls[ONE_PASS].verdict != "inferior":
        reasons.append("samples of one pass are not rejected")
    fewest = min(each.num_prompts for each in controls.values())
    if reasons and any(each.low is None for each in controls.values()):
        return f"{fewest} prompts are too few"
    return "; ".join(reasons)


def roll_up(rows: Sequence[dict[str, Any]], name: str) -> Verdict:
    """The verdict on a candidate: all metrics that count, and all guards, must be not inferior."""
    counting = [row for row in rows if row["counts"]]
    verdicts = {row["tests"][name]["verdict"] for row in rows if row["counts"] or row["guard"]}
    if "inferior" in verdicts:
        return "inferior"
    return "not inferior" if counting and verdicts == {"not inferior"} else "cannot tell"


def _chosen(gate: GateRecipe, names: str) -> dict[str, Settings]:
    wanted = list(dict.fromkeys(filter(None, names.split(","))))
    if len(wanted) < 2:
        raise UserError(f"--compare {names}: give two names or more, such as ar,dida")
    for name in wanted:
        if name not in gate.compare:
            known = ", ".join(gate.compare) or "none"
            raise UserError(f"--compare {name}: the recipe has no [compare.{name}]; it has {known}")
    return {name: gate.compare[name] for name in wanted}


def _rounded(outcome: Outcome) -> dict[str, Any]:
    return {key: _plain(each) for key, each in asdict(outcome).items()}


def _plain(number: Any) -> Any:
    """JSON has no NaN."""
    if not isinstance(number, float):
        return number
    return round(number, 4) if math.isfinite(number) else None
