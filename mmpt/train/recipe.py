"""What a training run is made of, as TOML says it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmpt.config import UserError, load_recipe, to_dict, to_toml, write_atomic
from mmpt.data.loader import DataConfig
from mmpt.data.pipeline_source import with_processors
from mmpt.decode.sampling import Sampling
from mmpt.eval.config import EvaluateConfig
from mmpt.model.backends import Backend
from mmpt.model.config import ModelConfig, NoiseConfig, Router
from mmpt.model.weights import read_config
from mmpt.train.checkpoint import find_model
from mmpt.train.guard import GuardConfig
from mmpt.train.optim import OptimConfig
from mmpt.train.parallel import ParallelConfig
from mmpt.train.samples import SamplesConfig
from mmpt.train.track import Name
from mmpt.vocab import Modality, Vocabulary

# what may change when a run goes on: it moves no weight. Folders may be moved; what they hold is
# guarded by the loader's fingerprint of the data and by the checkpoint itself
FREE = (
    *("checkpoint_every", "keep", "device", "vocabulary", "start"),
    *("data.workers", "data.sources.*.shards"),
    *("data.sources.*.processor", "data.sources.*.quarantine"),
    *("keep_every", "parallel.*", "guard.stall", "evaluate.*"),
    *("track", "profile", "samples.*", "attention", "distill.batch"),
)


@dataclass(frozen=True, kw_only=True)
class RunRecipe:
    """What pretraining and adaptation have in common."""

    data: DataConfig
    steps: int
    vocabulary: str = ""  # path of the vocabulary.json that `mmpt encode` wrote
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss_weights: dict[str, float] = field(default_factory=dict)  # by modality; 1 unless given
    accumulate: int = 1  # batches a step
    ema: float = 0.0  # decay of an average of the weights, such as 0.999; 0: none
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    attention: Backend = "sdpa"  # what computes it: flex and xformers need CUDA
    seed: int = 0
    checkpoint_every: int = 200  # steps
    keep: int = 2  # checkpoints, the newest ones
    keep_every: int = 0  # steps whose checkpoints are kept for good, as a multiple; 0: none
    max_bad_steps: int = 10  # steps in a row that are skipped, before the run stops
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    device: str = "auto"
    track: tuple[Name, ...] = ()  # where metrics go besides metrics.jsonl
    profile: tuple[int, ...] = ()  # the first step that PyTorch's profiler records, and how many

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "checkpoint_every", "keep", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use at least 1")
        if self.profile and (len(self.profile) != 2 or min(self.profile) < 1):
            raise UserError(f"profile = {list(self.profile)}; use [first step, number of steps]")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema = {self.ema}; use 0 for no average, or less than 1")
        known = [modality.name.lower() for modality in Modality]
        for name, weight in self.loss_weights.items():
            if name not in known or weight < 0:
                raise UserError(
                    f"loss_weights.{name} = {weight}; use {', '.join(known)} with at least 0"
                )


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(RunRecipe):
    """Pretraining. The model's vocab_size and vocabulary follow from `vocabulary`.

    A recipe that has `start` and says nothing of the model trains one of that shape.
    """

    model: ModelConfig
    z_loss: float = 0.0
    noise: float = 0.0  # share of codes shown as other codes, see `NextToken`
    codes_from: tuple[str, ...] = ()  # tokenizers whose latents initialise the codes' embeddings
    start: str = ""  # a model folder or run whose weights are the first ones
    new_rows_first: int = 0  # steps that train the rows of structure ids and codes, and no others
    # routers: train only the auxiliary routers of `start`, which choose experts at inference
    objective: Literal["next", "routers"] = "next"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the start model writes itself, before it learns to denoise it; see `train.distill`."""

    documents: int = 0  # whose media are sampled anew; 0: none
    share: float = 0.5  # of the ids that training reads; 1: it reads nothing else
    guidance: float = 1.0  # baked in: what is denoised later needs none
    temperature: float = 1.0
    top_p: float = 1.0
    batch: int = 32  # samples at a time

    def __post_init__(self) -> None:
        if self.documents < 0 or self.batch < 1 or not 0 < self.share <= 1:
            raise UserError(
                f"distill: documents = {self.documents}, batch = {self.batch}, share = "
                f"{self.share}; use documents >= 0, batch >= 1 and 0 < share <= 1"
            )
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How codes are drawn. Raises UserError for what cannot be."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True)
class AdaptRecipe(RunRecipe):
    """Adaptation to parallel decoding, from the model or run folder `start`."""

    start: str = ""
    max_noisy: int = 512  # noisy ids a row, of all copies together
    copies: int = 1  # of each block, at as many levels of noise, as far as they fit
    noise: NoiseConfig = field(default_factory=NoiseConfig)  # `max_block` follows from the data
    distill: DistillConfig = field(default_factory=DistillConfig)
    autoregressive: float = 0.0  # weight of predicting clean ids; above 0 all weights are trained
    router: Router | None = None  # of the experts of noisy ids; those of clean ones unless given
    capacity_slope: float = 0.0  # with expert choice, see `GroupConfig`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 1:
            raise UserError(f"copies = {self.copies}; use at least 1")
        if self.noise.max_block:
            raise UserError(
                f"noise.max_block = {self.noise.max_block} follows from the data; leave it out"
            )
        if self.noise.text_block >= self.max_noisy:
            raise UserError(
                f"noise.text_block = {self.noise.text_block} and its slot do not fit max_noisy = "
                f"{self.max_noisy}; use 4 to 32, or 0 for no text"
            )
        if self.noise.path == "metric" and self.autoregressive:
            raise UserError(
                f'noise.path = "metric" measures distances of embeddings, which autoregressive = '
                f"{self.autoregressive} would move; use autoregressive = 0 or another path"
            )


R = TypeVar("R", bound=RunRecipe)


def load_run_recipe(
    cls: type[R], path: str | Path, overrides: Iterable[str] = ()
) -> tuple[R, Vocabulary]:
    """A recipe and the vocabulary it names; a model's vocabulary fields are filled in."""
    overrides = list(overrides)
    if issubclass(cls, TrainRecipe):
        overrides.append("model.vocab_size=1")
    recipe = load_recipe(cls, path, overrides)
    if not recipe.vocabulary:
        raise UserError(f"{path}: vocabulary is missing; give the vocabulary.json of mmpt encode")
    vocabulary = Vocabulary.load(recipe.vocabulary)
    sources = with_processors(recipe.data.sources, Path(recipe.vocabulary).parent)
    recipe = replace(recipe, data=replace(recipe.data, sources=sources))
    if isinstance(recipe, TrainRecipe):
        if recipe.start and recipe.model == ModelConfig(vocab_size=1):
            recipe = replace(recipe, model=read_config(find_model(recipe.start))[0])
        recipe = replace(recipe, model=fit_model(recipe.model, vocabulary))
    return recipe, vocabulary


def fit_model(config: ModelConfig, vocabulary: Vocabulary) -> ModelConfig:
    """The same model over the ids of a vocabulary."""
    return replace(config, vocab_size=len(vocabulary), vocabulary=vocabulary.fingerprint)


def keep_recipe(run: Path, recipe: RunRecipe, *, resumed: bool, write: bool = True) -> None:
    """Store the resolved recipe in the run folder; a resumed run must have the same one.

    write: only one of several ranks does.
    """
    path = run / "recipe.toml"
    if resumed and path.is_file():
        # options that came later have their defaults
        ours, theirs = (
            dict(_flatten(to_dict(each))) for each in (recipe, load_recipe(type(recipe), path))
        )
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key) and not _is_free(key):
                raise UserError(
                    f"{run} was begun with {key} = {theirs.get(key)}, now it is {ours.get(key)}; "
                    "restore the old value or choose a new --out"
                )
    if write:
        write_atomic(path, to_toml(recipe))


def _is_free(key: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in FREE)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
