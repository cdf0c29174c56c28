"""The codec contract: encode, decode, stream, fingerprint, save and load.

Codes come from one path. A codec cuts its medium into units of fixed shape (an image; the next
four frames; 0.8 s of sound) and computes each unit alone, in fp32, with batch size one; encoding a
whole medium IS pushing it through a stream. So the codes of a streamed medium equal the codes of
the whole, for any chunking, ragged tail and batch, by construction and not by luck of rounding.
"""

import abc
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mmpt import hub
from mmpt.config import UserError, from_dict, to_dict, write_atomic
from mmpt.tokenizers import KINDS
from mmpt.vocab import Modality

FORMAT_VERSION = 2  # 1: image codecs had `levels` where they now have a quantiser


class Codec(nn.Module, abc.ABC):
    """A media tokenizer. `config` is frozen; codes are int64 (batch, ..., codebooks)."""

    kind: ClassVar[str]
    modality: ClassVar[Modality]
    config_class: ClassVar[type]
    factor: int = 1  # pixels a side that one code stands for; 1 where there are no sides
    name: str = ""  # of the folder it was loaded from
    folder: Path | None = None  # None: it was never saved
    sample_rate: int = 0  # Hz of the waves it takes; 0: no codec of sound

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    @abc.abstractmethod
    def codebook_size(self) -> int:
        """Number of legal codes; each is in [0, codebook_size)."""

    @property
    def num_codebooks(self) -> int:
        """Codes of one position, the last axis of codes."""
        return 1

    @property
    @abc.abstractmethod
    def rate(self) -> str:
        """Codes per unit of medium, for people: '64 codes per 64 x 64 pixels'."""

    def defining_config(self) -> dict[str, Any]:
        """The settings that define the codes, for the fingerprint; all unless a codec says less."""
        return to_dict(self.config)

    @abc.abstractmethod
    def defining_tensors(self) -> dict[str, Tensor]:
        """The tensors that define the codes (encoder and quantiser), for the fingerprint."""

    @abc.abstractmethod
    def encode(self, media: Any, /) -> Tensor:
        """Codes of a batch of media; the text codec takes one text."""

    @abc.abstractmethod
    def decode(self, codes: Tensor, /) -> Any:
        """The media of codes; accepts every legal code."""

    @abc.abstractmethod
    def stream(self) -> Any:
        """An object with `push(any size) -> codes` and `flush() -> codes`."""

    def code_latents(self) -> Tensor:
        """What each code stands for, (codebook_size, width), to initialise embeddings."""
        raise UserError(f"a {self.kind} codec has no latents")

    @property
    def fingerprint(self) -> str:
        """sha256 over the config and the tensors that define the codes, 16 hex digits."""
        digest = hashlib.sha256(json.dumps(self.defining_config(), sort_keys=True).encode())
        for name, tensor in sorted(self.defining_tensors().items()):
            digest.update(name.encode())
            # as stored: a freshly trained codec and the same codec loaded agree
            digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the codec computes."""
        return next(self.parameters()).device

    def check_codes(self, codes: Tensor, num_dims: int) -> Tensor:
        """Refuse codes of a wrong shape or range; returns them as int64 on the codec's device."""
        count = self.num_codebooks
        if codes.ndim != num_dims or codes.shape[-1] != count or codes.numel() == 0:
            raise UserError(
                f"{self.kind} codes need {num_dims} dimensions, the last of size {count}, and at "
                f"least one code; got shape {tuple(codes.shape)}"
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise UserError(
                f"{self.kind} codes must be in [0, {self.codebook_size}); got {low} to {high}"
            )
        return codes.to(self.device, torch.int64)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (fp16), each atomically."""
        folder = Path(folder)
        config = {"format_version": FORMAT_VERSION, "kind": self.kind, **to_dict(self.config)}
        tensors = {
            name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
            for name, tensor in self.state_dict().items()
        }
        write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors))
        write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")

    def load_weights(self, folder: Path) -> None:
        """Fill this module from `folder`/model.safetensors; strict, computed in fp32."""
        try:
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            for name, tensor in tensors.items():
                tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
            self.load_state_dict(tensors, strict=True)
        except (OSError, safetensors.SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}/model.safetensors does not fit its config: {reason}"
            ) from None

    @classmethod
    def upgrade(cls, config: dict[str, Any], version: int) -> dict[str, Any]:
        """The config of an older format in the present form; most have not changed."""
        return config

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Open what `save` wrote; `config` is the content of config.json."""
        codec = cls(from_dict(cls.config_class, config, where=f"{folder}/config.json"))
        codec.load_weights(folder)
        return codec.eval()


def through(stream: Any, medium: Tensor) -> Tensor:
    """What a stream makes of a whole medium: everything pushed at once, and its tail."""
    return torch.cat([stream.push(medium), stream.flush()])


def codec_folder(name_or_path: str | Path) -> Path:
    """The folder of a codec given as a path or as a name of the shipped zoo."""
    if (Path(name_or_path) / "config.json").is_file():
        return Path(name_or_path)  # a folder opens where no zoo is, too
    if (name := hub.name_of(name_or_path)) is not None:
        return hub.fetch(name)
    folder = hub.shipped("tokenizers") / str(name_or_path)
    if (folder / "config.json").is_file():
        return folder
    known = ", ".join(codec_names())
    raise UserError(
        f"no tokenizer {str(name_or_path)!r}; give a folder with config.json or one of: {known}"
    )


def codec_names() -> list[str]:
    """The names of the shipped zoo."""
    return sorted(path.parent.name for path in hub.shipped("tokenizers").glob("*/config.json"))


def load_codec(name_or_path: str | Path) -> Codec:
    """Open a codec by name or folder. Raises UserError in one line."""
    folder = codec_folder(name_or_path)
    try:
        config = json.loads((folder / "config.json").read_text())
        if "model_type" in config:  # a folder of the library `transformers`
            from mmpt.tokenizers.adapters import describe

            config = describe(folder, config)
        version, kind = int(config.pop("format_version")), str(config.pop("kind"))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/config.json is no codec config: {error!r}") from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format {version}; this mmpt reads up to {FORMAT_VERSION}: upgrade"
        )
    if kind not in KINDS:
        raise UserError(f"{folder}: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    module, class_name = KINDS[kind].split(":")
    codec_class = getattr(importlib.import_module(module), class_name)
    codec = codec_class.load(folder, codec_class.upgrade(config, version))
    codec.folder = folder.resolve()
    codec.name = codec.folder.name
    return codec


def tensors_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The state of the named submodules, by full name."""
    prefixes = tuple(f"{name}." for name in names)
    return {key: value for key, value in module.state_dict().items() if key.startswith(prefixes)}


def config_hash(config: Any) -> str:
    """A short hash of a config dataclass."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
