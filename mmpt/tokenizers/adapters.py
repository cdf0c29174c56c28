"""Other people's codecs, from the library `transformers`, as codecs of ours.

A folder of `transformers` (config.json with a `model_type` of the table; model.safetensors, whole
or in parts) opens through `load_codec`, from the disk and never from a network; `adapt` opens it
with options, and `save` writes a folder that opens alike.

| kind      | model_type                   | medium        | codebooks | decodes       |
|-----------|------------------------------|---------------|-----------|---------------|
| emu3      | emu3_vqgan, emu3             | image, frames | 1         | yes           |
| chameleon | chameleon_vqgan, chameleon   | image         | 1         | no decoder    |
| mimi      | mimi                         | speech        | 2 or more | yes           |
| dac       | dac                          | speech        | 1 or more | yes           |
| encodec   | encodec (mono, no chunks)    | speech        | 1 or more | yes           |
| xcodec    | xcodec                       | speech        | 1 or more | yes           |

All six were checked with random weights only, never with released ones. A whole Emu3 or Chameleon
model gives its picture tokenizer. A folder that opens may still hold what was trained on pixels or
waves of another scale: pictures are scaled as its preprocessor_config.json says.

None of these models computes the same numbers in pieces, so the unit is the whole medium: it is
computed alone, in fp32 and eval mode, and a stream collects until `flush`. Sound is bounded by
`MAX_SECONDS`.
"""

import abc
import dataclasses
import hashlib
import importlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors
import torch
from torch import Tensor, nn

from mmpt.config import UserError, from_dict, write_atomic
from mmpt.tokenizers.base import FORMAT_VERSION, Codec, load_codec, tensors_of

MAX_SECONDS = 60.0
WHOLE_MODEL = "vqmodel."  # where a model of pictures and text keeps its picture tokenizer
TRAINING_ONLY = "masked_spec_embed"  # a weight that released models may lack
# settings of `transformers` that say nothing about the codes
VOLATILE = {"transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"}
KIND_OF = {
    "emu3_vqgan": "emu3",
    "emu3": "emu3",
    "chameleon_vqgan": "chameleon",
    "chameleon": "chameleon",
    "mimi": "mimi",
    "dac": "dac",
    "encodec": "encodec",
    "xcodec": "xcodec",
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """transformers: the model's own config.json.

    num_codebooks: of a codec of sound, how many of its codebooks are used, from the first; 0: all.
    rescale, mean, std: a picture's byte b becomes (b rescale - mean) / std, by channel.
    """

    transformers: dict
    num_codebooks: int = 0
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.num_codebooks < 0 or self.rescale <= 0 or min(self.std) <= 0:
            raise UserError(
                f"num_codebooks = {self.num_codebooks}, rescale = {self.rescale}, std = "
                f"{self.std}: use 0 or more codebooks and scales above 0"
            )


class Adapter(Codec):
    """A model of `transformers`. Subclasses say how to call it."""

    config_class = AdapterConfig
    config: AdapterConfig
    model_class: ClassVar[str]  # module and name in transformers.models
    defining: ClassVar[tuple[str, ...]]  # the parts of the model that define the codes

    def __init__(self, config: AdapterConfig, model: nn.Module) -> None:
        super().__init__(config)
        self.model: Any = model.float().requires_grad_(False)
        self.eval()

    @abc.abstractmethod
    def codebooks(self) -> list[Tensor]:
        """What each code of each codebook stands for, (codebook_size, width) each."""

    @property
    def codebook_size(self) -> int:
        return len(self.codebooks()[0])

    @property
    def num_codebooks(self) -> int:
        return self.config.num_codebooks or len(self.codebooks())

    def code_latents(self) -> Tensor:
        """(codebook_size, width); of several codebooks (codebooks, codebook_size, width)."""
        books = torch.stack(self.codebooks()[: self.num_codebooks]).detach()
        return books[0] if len(books) == 1 else books

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: in training some of these models drop codebooks at random."""
        return super().train(False)

    def defining_config(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self.config)}

    def defining_tensors(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.model, self.defining)
        return {key: value for key, value in tensors.items() if not key.endswith(TRAINING_ONLY)}

    @property
    def fingerprint(self) -> str:
        """As `Codec.fingerprint`, but over fp32: these weights are stored as they are."""
        digest = hashlib.sha256(json.dumps(self.defining_config(), sort_keys=True).encode())
        for name, tensor in sorted(self.defining_tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (as computed, fp32), each atomically."""
        folder = Path(folder)
        config = {"format_version": FORMAT_VERSION, "kind": self.kind}
        with tempfile.TemporaryDirectory() as place, _quiet():
            # names of tensors as released models have them, whatever they are inside
            self.model.save_pretrained(place, max_shard_size="1TB")
            tensors = (Path(place) / "model.safetensors").read_bytes()
        write_atomic(folder / "model.safetensors", tensors)
        config |= dataclasses.asdict(self.config)
        write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Self:
        settings = from_dict(AdapterConfig, config, where=f"{folder}/config.json")
        settings = dataclasses.replace(settings, transformers=_lasting(settings.transformers))
        return cls(settings, _open(cls.model_class, settings.transformers, folder))

    @classmethod
    def of(cls, model: nn.Module, **options: Any) -> Self:
        """Adapt a model that is in memory; options: the other fields of `AdapterConfig`."""
        config: Any = model.config
        settings = json.loads(config.to_json_string(use_diff=True))
        return cls(AdapterConfig(transformers=_lasting(settings), **options), model)


class WholeStream:
    """push(part) collects, flush() computes: the unit is the whole medium.

    run: what is done with all of it; nothing: what comes out before. At most `limit` of `unit`.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], nothing: Tensor, *, limit: int, unit: str
    ) -> None:
        self._run, self._nothing, self._limit, self._unit = run, nothing, limit, unit
        self._waiting: list[Tensor] = []

    def push(self, part: Tensor) -> Tensor:
        """Nothing yet. Raises UserError when more has come than is computed at once."""
        count = sum(map(len, self._waiting)) + len(part)
        if count > self._limit:
            raise UserError(
                f"{count} {self._unit} in one piece; this codec computes at most {self._limit} at "
                "once: flush before, or cut the sound"
            )
        if len(part):
            self._waiting.append(part)
        return self._nothing

    def flush(self) -> Tensor:
        """All of it; the stream is as new."""
        waiting, self._waiting = self._waiting, []
        return self._run(torch.cat(waiting)) if waiting else self._nothing


def adapt(folder: str | Path, *, num_codebooks: int = 0) -> Adapter:
    """Open a folder of `transformers` and use the first `num_codebooks` of its codebooks (0: all).

    Mimi speaks with 8 of its 32 codebooks, for example. Save the result to keep the choice.
    """
    codec = load_codec(folder)
    if not isinstance(codec, Adapter):
        raise UserError(f"{folder} holds a codec of kind {codec.kind}, none of transformers")
    return type(codec)(dataclasses.replace(codec.config, num_codebooks=num_codebooks), codec.model)


def describe(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Our config.json for a folder that has one of `transformers`. UserError for other models."""
    model_type = config["model_type"]
    if model_type not in KIND_OF:
        raise UserError(
            f"{folder} holds a {model_type!r} model of transformers; "
            f"these open as a codec: {', '.join(KIND_OF)}"
        )
    ours = {"format_version": FORMAT_VERSION, "kind": KIND_OF[model_type]}
    return ours | {"transformers": config.get("vq_config") or config} | _scaling(folder)


def _scaling(folder: Path) -> dict[str, Any]:
    # how the pictures of a released model were scaled
    path = folder / "preprocessor_config.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    names = {"rescale": "rescale_factor", "mean": "image_mean", "std": "image_std"}
    return {ours: data[theirs] for ours, theirs in names.items() if theirs in data}


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that change from version to version."""
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in VOLATILE and not key.startswith("_")
    }


def _open(model_class: str, settings: dict[str, Any], folder: Path) -> nn.Module:
    # the model with the weights of `folder`; those that it does not know are left out
    module, name = model_class.split(":")
    try:
        from huggingface_hub.errors import StrictDataclassError

        kind: Any = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except ImportError as error:
        raise UserError(
            f"{folder} holds a codec of transformers, which does not load here ({error}): "
            "pip install 'mmpt[eval]'"
        ) from None
    tensors = _read(folder)
    try:
        config = kind.config_class.from_dict(settings)
        with _quiet():
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                output_loading_info=True,
                local_files_only=True,
            )
    except (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} does not make a {name}: {reason}") from None
    wrong = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    wrong = sorted(key for key in wrong if not key.endswith(TRAINING_ONLY))
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}; "
            f"it is no {name} of this config"
        )
    return model


def _read(folder: Path) -> dict[str, Tensor]:
    """The fp32 tensors of a folder, of its picture tokenizer alone where that is a part."""
    index = folder / "model.safetensors.index.json"
    try:
        files = ["model.safetensors"]
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        places = {}
        for file in files:
            with safetensors.safe_open(folder / Path(file).name, framework="pt") as opened:
                places |= dict.fromkeys(opened.keys(), file)
        inner = {key: file for key, file in places.items() if WHOLE_MODEL in key}
        tensors = {}
        for key, file in (inner or places).items():
            with safetensors.safe_open(folder / Path(file).name, framework="pt") as opened:
                tensor = opened.get_tensor(key)
            name = key.partition(WHOLE_MODEL)[2] if inner else key
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read the weights of {folder}: {error}; it needs model.safetensors"
        ) from None
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers draws bars and tables; what matters is raised in one line instead
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
