"""Tasks of EleutherAI's lm_eval, such as hellaswag, over the text of a model.

A text is asked for as training shows one: `<bod>`, its ids, and `<eod>` where it ends. Log-
likelihoods are by the full softmax over the vocabulary, as all of `mmpt eval`. What is longer than
`length` loses its oldest ids and keeps `<bod>`; only rolling likelihoods, which cut a document into
windows, go on without it, as later rows of a long page do in training.

Importing this module needs lm_eval (the extra `eval-text`).
"""

# types are also checked where the extra is absent
# pyright: reportMissingImports=false

import difflib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mmpt.config import UserError
from mmpt.decode.ar import generate_steps
from mmpt.decode.sampling import Sampling
from mmpt.eval.passes import BATCH, Passes
from mmpt.pipeline import Pipeline
from mmpt.stream import Stream
from mmpt.tokenizers.text import text_ids
from mmpt.vocab import Modality
from mmpt.writer import TextWriter

LENGTH = 512  # ids that a model sees at most, unless it is said otherwise
MAX_IDS = 256  # of an answer whose task does not say

Pair = tuple[Sequence[int], Sequence[int]]
"""Ids that are given, at least one, and ids that are scored."""


def evaluate_tasks(
    pipeline: Pipeline,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: Path | None = None,
    length: int = LENGTH,
) -> dict[str, Any]:
    """What lm_eval reports of each task, group or tag, by its name.

    limit: documents of each task. fewshot: examples in a prompt; None leaves it to the task.
    include_path: a folder of task files of one's own. Raises UserError for an unknown task, and
    for data that cannot be had.
    """
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=1, cutoff=0.5)
            raise UserError(
                f"lm_eval has no task {task!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    try:
        done = simple_evaluate(
            model=TextModel(pipeline, length=length),
            tasks=[*manager.match_tasks(list(tasks))],
            num_fewshot=fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # no network, or no such file or data set
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the data of {', '.join(tasks)} cannot be had: {reason}") from None
    results: Any = (done or {}).get("results", {})  # whose keys are names of metrics
    return {
        "lm_eval": lm_eval.__version__,
        "fingerprint": pipeline.fingerprint,
        "length": length,
        "tasks": {name: _told(values) for name, values in results.items()},
    }


class TextModel(TemplateLM):
    """A pipeline as lm_eval asks it. length: ids that it sees at most; batch: rows of a pass."""

    def __init__(self, pipeline: Pipeline, *, length: int = LENGTH, batch: int = BATCH) -> None:
        super().__init__()
        if length < 2:
            raise UserError(f"length = {length}; use 2 or more")
        self.pipeline, self.length, self.batch = pipeline, length, batch
        self._vocabulary = pipeline.processor.vocabulary
        self._passes = Passes(pipeline.model, self._vocabulary, batch=batch)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self._vocabulary.structure_id("<eod>")

    @property
    def prefix_token_id(self) -> int:
        """The id that begins a document."""
        return self._vocabulary.structure_id("<bod>")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, and no others."""
        return text_ids(self.pipeline.processor.text, string).tolist()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: each id once, with as much before it as windows leave."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.length - 1, 1
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs), strict=True):
            sums[owner] += score
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop, the end of the document, or as many ids as a task allows."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[repr(request.args[1])].append(place)
        chunks = [
            places[begin : begin + self.batch]
            for places in alike.values()
            for begin in range(0, len(places), self.batch)
        ]
        for chunk in tqdm(chunks, desc="generate", unit="batch", disable=disable_tqdm):
            settings = requests[chunk[0]].args[1]
            prompts = [requests[place].args[0] for place in chunk]
            made = self._generate(prompts, settings, seeds=chunk)
            for place, text in zip(chunk, made, strict=True):
                texts[place] = text
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # as the library: spaces at the end belong to what follows
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        given, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(given)] != given:  # a merge over the border: nothing of it may get lost
            whole = given + self.tok_encode(continuation)
        return [self.prefix_token_id, *given], whole[len(given) :]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        return self._score([self._fit(given, scored) for _, given, scored in requests])

    def _fit(self, given: Sequence[int], scored: Sequence[int]) -> Pair:
        """The newest that fits, behind `<bod>`; what is scored is cut only where it is too long."""
        scored = scored[-(self.length - 1) :]
        room = self.length - 1 - len(scored)
        rest = list(given[1:])
        return [given[0], *rest[len(rest) - min(room, len(rest)) :]], scored

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        streams = []
        for given, scored in pairs:
            ids = np.array([*given, *scored], dtype=np.int64)
            weight = (np.arange(len(ids)) >= len(given)).astype(np.float32)
            streams.append(Stream(ids, np.zeros(len(ids), dtype=np.int8), weight))
        return self._passes.scores(streams)

    def _generate(
        self, prompts: Sequence[str], settings: dict[str, Any], *, seeds: Sequence[int]
    ) -> list[str]:
        options: dict[str, Any] = {**normalize_gen_kwargs(settings, MAX_IDS)}
        max_ids = min(options["max_gen_toks"], self.length - 1)
        rows = [
            self._fit([self.prefix_token_id, *self.tok_encode(prompt)], [0] * max_ids)[0]
            for prompt in prompts
        ]
        until = options["until"]
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        writers = [TextWriter(self.pipeline.processor, stops) for _ in rows]
        steps = generate_steps(
            self.pipeline.model,
            self._vocabulary,
            [np.array(row, dtype=np.int64) for row in rows],
            max_ids=max_ids,
            sampling=Sampling(
                temperature=options.get("temperature", 0.0),
                top_k=int(options.get("top_k", 0)),
                top_p=options.get("top_p", 1.0),
            ),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            allow=(Modality.TEXT,),
        )
        with torch.inference_mode():
            for step in steps:
                for writer, token in zip(writers, step.ids, strict=True):
                    writer.push(token)
                if all(
                    writer.stopped or token is None
                    for writer, token in zip(writers, step.ids, strict=True)
                ):
                    break
        return [writer.text for writer in writers]


def _told(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers by metric; the filter of a metric is named where it is not `none`."""
    named = {key.removesuffix(",none"): value for key, value in values.items()}
    left_out = ("alias", "name")
    return {k: v for k, v in named.items() if k not in left_out and v != "N/A"}
