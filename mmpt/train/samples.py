"""What a running model makes of held-out prompts, by the code that inference uses.

Every few steps, captions are answered with pictures, clips and speech, by both decoders where the
model has noisy groups, and pictures with words. The prompts and seeds stay the same, so that steps
can be compared. Weights, expert loads and random generators are as if nothing had happened.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path

import torch

from mmpt.config import UserError
from mmpt.data.quarantine import Quarantine
from mmpt.data.shards import read_documents
from mmpt.model.transformer import Decoder
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.pipeline import Pipeline
from mmpt.processor import Processor, ProcessorSettings
from mmpt.results import Medium, Method, Result
from mmpt.train.metrics import forget_after
from mmpt.vocab import Vocabulary

log = logging.getLogger(__name__)

KINDS: dict[Medium, type] = {"image": Image, "video": Video, "speech": Audio}
SUFFIXES = {Text: ".txt", Image: ".png", Video: ".mp4", Audio: ".wav"}


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """How often, from what, and how many of each medium."""

    every: int = 0  # steps; 0: never
    shards: tuple[str, ...] = ()  # raw ones with held-out captions of media: paths or globs
    text: int = 4  # pictures that are put into words
    image: int = 4
    video: int = 0
    speech: int = 2
    guidance: float = 1.0
    max_seconds: float = 2.0  # of speech

    def __post_init__(self) -> None:
        if min(self.every, self.text, self.image, self.video, self.speech) < 0:
            raise UserError(f"samples: {asdict(self)}; use counts of at least 0")
        if self.every and not self.shards:
            raise UserError("samples.shards is empty; name raw shards that hold captions of media")


class Samples:
    """The prompts of a run, and where answers go: RUN/samples/step-N, and a line of index.jsonl.

    step: lines of later ones are dropped, for they will be done again.
    """

    def __init__(
        self,
        config: SamplesConfig,
        folder: Path,
        *,
        vocabulary: Vocabulary,
        settings: ProcessorSettings | None,
        step: int,
    ) -> None:
        if settings is None:
            raise UserError(
                "samples need the data's tokenizers, but no processor.json is beside the "
                "vocabulary; encode with mmpt encode, or leave samples.every out"
            )
        self._config, self._folder = config, folder / "samples"
        self._processor = Processor.load(
            settings.tokenizers, vocabulary=vocabulary, max_side=settings.max_side
        )
        self._prompts = _find_prompts(config)
        forget_after(self._folder / "index.jsonl", step)

    def make(self, model: Decoder, step: int) -> None:
        """All samples of this step; what fails is said, and training goes on."""
        training, device = model.training, model.embedding.device
        self._processor.to(device)
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                pipeline = Pipeline(model, self._processor)
                for medium, decoder in self._kinds(model):
                    self._save(step, medium, decoder, self._answer(pipeline, medium, decoder))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            log.warning("no samples of step %d: %s; training goes on", step, reason)
        finally:
            model.train(training)

    def _kinds(self, model: Decoder) -> Iterator[tuple[Medium, Method]]:
        noisy = any(group.noisy for group in model.config.groups.values())
        for medium, prompts in self._prompts.items():
            if prompts:
                yield medium, "ar"
                if noisy and medium != "text":
                    yield medium, "dida"

    def _answer(self, pipeline: Pipeline, medium: Medium, decoder: Method) -> list[Result]:
        prompts, side = self._prompts[medium], self._processor.max_side
        return pipeline.batch(
            [[prompt] for prompt in prompts],
            to=medium,
            seeds=range(len(prompts)),
            decoder=decoder,
            guidance=self._config.guidance,
            max_seconds=self._config.max_seconds,
            height=side,
            width=side,
            max_ids=32,
        )

    def _save(self, step: int, medium: Medium, decoder: Method, results: list[Result]) -> None:
        folder = self._folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, (result, prompt) in enumerate(zip(results, self._prompts[medium], strict=True)):
            path = folder / f"{medium}-{number}-{decoder}{SUFFIXES[type(result[0])]}"
            result[0].save(path)
            row = {
                "step": step,
                "file": str(path.relative_to(self._folder)),
                "prompt": self._shown(prompt, number),
                **result.provenance(),
            }
            with (self._folder / "index.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _shown(self, prompt: Part, number: int) -> str:
        """Words, or the file of another prompt, which is written once."""
        if isinstance(prompt, Text):
            return prompt.text
        path = self._folder / "prompts" / f"text-{number}{SUFFIXES[type(prompt)]}"
        if not path.exists():
            prompt.save(path)
        return str(path.relative_to(self._folder))


def _find_prompts(config: SamplesConfig) -> dict[Medium, list[Part]]:
    """The first captions of each medium that is asked for, and pictures for words."""
    paths = sorted(path for pattern in config.shards for path in glob(pattern))
    if not paths:
        raise UserError(f"samples.shards = {list(config.shards)}: no such file")
    wanted: dict[Medium, int] = {
        "text": config.text,
        "image": config.image,
        "video": config.video,
        "speech": config.speech,
    }
    prompts: dict[Medium, list[Part]] = {medium: [] for medium in wanted}
    for document in read_documents(paths, Quarantine(None)):
        of_kind = {type(part): part for part in reversed(document.parts)}
        for medium, kind in KINDS.items():
            if kind in of_kind and Text in of_kind and len(prompts[medium]) < wanted[medium]:
                prompts[medium].append(of_kind[Text])
        if Image in of_kind and len(prompts["text"]) < wanted["text"]:
            prompts["text"].append(of_kind[Image])
        if all(len(prompts[medium]) == count for medium, count in wanted.items()):
            break
    if missing := [m for m, count in wanted.items() if len(prompts[m]) < count]:
        log.warning("samples.shards hold too few prompts for %s", ", ".join(missing))
    return prompts
