"""What happens beside the steps of a run: sinks, profiles, samples, evaluations, stalled ranks.

Nothing of it changes what is trained.
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from mmpt.config import to_dict
from mmpt.eval.during import Evaluation
from mmpt.model.transformer import Decoder
from mmpt.processor import ProcessorSettings
from mmpt.train.metrics import Metrics
from mmpt.train.parallel import Ranks
from mmpt.train.profile import Profiler
from mmpt.train.recipe import RunRecipe
from mmpt.train.samples import Samples
from mmpt.train.stall import Pulse, Watch
from mmpt.train.track import Track
from mmpt.vocab import Vocabulary

log = logging.getLogger(__name__)


class Watching:
    """Watches the run in `folder` while it is entered, from after step `step` on.

    encoded: the folder of the token shards. Raises UserError for what a recipe asks and is not
    there, before the first step.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        folder: Path,
        *,
        vocabulary: Vocabulary,
        encoded: Path | None,
        processor: ProcessorSettings | None,
        ranks: Ranks,
        pulse: Pulse,
        step: int,
    ) -> None:
        self._recipe, self._folder, self._ranks = recipe, folder, ranks
        self._pulse, self._step, self._stack = pulse, step, ExitStack()
        self._samples = self._find_samples(vocabulary, processor)
        self.evaluation: Evaluation | None = None
        if recipe.evaluate.every:
            self.evaluation = Evaluation(
                recipe.evaluate,
                folder,
                vocabulary=vocabulary,
                encoded=encoded,
                ranks=ranks,
                step=step,
                bf16=recipe.precision != "fp32",
            )

    def __enter__(self) -> Self:
        recipe, ranks = self._recipe, self._ranks
        enter = self._stack.enter_context
        self._track = enter(
            Track(
                self._folder,
                recipe.track,
                first=self._step + 1,
                config=to_dict(recipe),
                write=ranks.first,
            )
        )
        enter(
            Watch(
                self._folder / "alive",
                self._pulse,
                rank=ranks.rank,
                count=ranks.count,
                seconds=recipe.guard.stall,
            )
        )
        self._profiler = enter(Profiler(self._folder, recipe.profile, rank=ranks.rank))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def before(self, step: int) -> None:
        """Called before a step."""
        self._profiler.before(step)

    def after(self, metrics: Metrics, model: Decoder) -> Metrics:
        """Called after a step, on all ranks; the metrics with what watching adds to them."""
        step, tokens = metrics["step"], metrics["tokens"]
        metrics = metrics | {"dropped": self._track.dropped}
        self._profiler.after(step)
        self._track.write(metrics)
        if self._samples and step % self._recipe.samples.every == 0:
            self._pulse.begin("samples")
            self._samples.make(model, step)
        if self.evaluation:
            self._pulse.begin("evaluation")
            self.evaluation.after(step, tokens, model, last=step == self._recipe.steps)
        return metrics

    def _find_samples(
        self, vocabulary: Vocabulary, processor: ProcessorSettings | None
    ) -> Samples | None:
        if not self._recipe.samples.every:
            return None
        if self._ranks.count > 1:
            if self._ranks.first:
                log.warning("samples are left out: they need the whole model on one process")
            return None
        return Samples(
            self._recipe.samples,
            self._folder,
            vocabulary=vocabulary,
            settings=processor,
            step=self._step,
        )
