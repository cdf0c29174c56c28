"""Checkpoints: a folder of safetensors and JSON that is either whole or absent.

Every rank writes its parts of the weights (`model/`) and of the optimiser (`optimizer/`) by
PyTorch's distributed checkpoints in their safetensors form, so that any other number of ranks can
read them. `config.json` and `model/` make it a model folder, which `Decoder.load` reads as it is;
beside them stand the vocabulary, the processor's settings, the loader's state (`loader-N.json`, by
rank) and `state.json` (counters and more, and the checksum of every file).

A checkpoint is copied to the host while training waits, and written while it goes on, on a process
group of its own; it is renamed into place when all ranks are done.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mmpt import hub
from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.model.weights import files_of, write_parts
from mmpt.processor import FILE as PROCESSOR_FILE
from mmpt.processor import ProcessorSettings
from mmpt.vocab import Vocabulary

FORMAT_VERSION = 2  # 1 had whole tensors, and one rank's loader in state.json
PREFIX, CHECKPOINTS = "step-", "checkpoints"

log = logging.getLogger(__name__)


@dataclass
class Moment:
    """What a checkpoint keeps besides the weights, of one rank.

    state: JSON, equal on all ranks. loader: this rank's. extra: name -> more tensors by name, each
    kept in a folder of that name, such as averaged weights.
    """

    step: int
    state: Mapping[str, Any]
    loader: Mapping[str, Any]
    vocabulary: Vocabulary
    processor: ProcessorSettings | None = None
    extra: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of a run, written by all its ranks, the newest `keep` of them kept.

    keep_every: those whose step is a multiple of it are kept for good; 0: none.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, keep_every: int = 0, device: str = "cpu"
    ) -> None:
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self.rank, self.count = 0, 1
        self._group: ProcessGroup | None = None
        if distributed.is_initialized():
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
            # what training sends must not wait for what is written
            self._group = distributed.new_group(backend="gloo")  # type: ignore[assignment] # torch's hint knows ranks outside of it
        self._pinned = device != "cpu"
        self._writer: threading.Thread | None = None
        self._failure: str | None = None
        self.failed = 0  # checkpoints that could not be written
        self.seconds = 0.0  # that training waited for them

    def begin(
        self, model: Decoder, optimizer: torch.optim.Optimizer | None, moment: Moment
    ) -> Path:
        """Copy everything to the host, and write it behind the caller's back; see `wait`.

        optimizer: None where its tensors are among those of the moment.
        """
        began = time.monotonic()
        self.wait()
        parts = {
            "model": model.state_dict(),
            "optimizer": flatten(model, optimizer) if optimizer else {},
            **moment.extra,
        }
        options = StagingOptions(self._pinned, False, False, self._pinned)
        # a new one each time: a second copy by the same one fails (PyTorch 2.11)
        stager = DefaultStager(options)
        parts = stager.stage(parts)
        stager.close()
        path = self.folder / f"{PREFIX}{moment.step:08d}"
        config = model.config_json() if self.rank == 0 else ""
        self._writer = threading.Thread(
            target=self._write, args=(path, parts, moment, config), daemon=True
        )
        self._writer.start()
        self.seconds += time.monotonic() - began
        return path

    def wait(self) -> str | None:
        """Until what was begun is written; returns why it could not be."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        return failure

    def save(self, model: Decoder, optimizer: torch.optim.Optimizer | None, moment: Moment) -> Path:
        """Write a checkpoint; UserError when that fails."""
        path = self.begin(model, optimizer, moment)
        if failure := self.wait():
            raise UserError(failure)
        return path

    def _write(
        self, path: Path, parts: Mapping[str, Mapping[str, Any]], moment: Moment, config: str
    ) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            reason = self._try(self._prepare, temporary, config, moment)
            for name, tensors in parts.items():
                reason = reason or self._try(self._write_part, temporary / name, tensors)
            reason = reason or self._try(self._finish, temporary, path, moment)
        except Exception as error:  # a rank is gone: training will notice by itself
            reason = str(error)
        if reason:
            self.failed += 1
            self._failure = (
                f"cannot write checkpoint {path}: {reason}; free space or choose another place"
            )
            log.error("%s", self._failure)
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _try(self, act: Callable[..., None], *arguments: Any) -> str | None:
        """Why it failed, on whichever rank; all ranks hear of it."""
        reason = None
        try:
            act(*arguments)
        except CheckpointException as error:  # every rank raises it
            failures = [str(each[0]) for each in error.failures.values()]
            reason = " ".join(failures[0].split())[:200]
        except (OSError, SafetensorError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        reasons = self._gather(reason)
        return next((each for each in reasons if each), None)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values = [None] * self.count
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def _prepare(self, temporary: Path, config: str, moment: Moment) -> None:
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{PREFIX}*.tmp"):  # of a killed process
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        (temporary / "config.json").write_text(config)
        moment.vocabulary.save(temporary / "vocabulary.json")
        if moment.processor is not None:
            moment.processor.save(temporary)

    def _write_part(self, folder: Path, tensors: Mapping[str, Any]) -> None:
        if not tensors:
            return
        folder.mkdir(exist_ok=True)
        write_parts(tensors, folder, self._group)

    def _finish(self, temporary: Path, path: Path, moment: Moment) -> None:
        (temporary / f"loader-{self.rank:05d}.json").write_text(json.dumps(moment.loader))
        self._gather(None)  # all files are there
        files = _files(temporary)[self.rank :: self.count]
        sums = self._gather({str(f.relative_to(temporary)): sha256_of(f) for f in files})
        for file in files:
            _flush(file)
        self._gather(None)
        if self.rank:
            return
        data = {
            "format_version": FORMAT_VERSION,
            "step": moment.step,
            "files": {name: value for each in sums for name, value in each.items()},
            "state": moment.state,
        }
        (temporary / "state.json").write_text(json.dumps(data))
        for each in (temporary / "state.json", *(p for p in temporary.iterdir() if p.is_dir())):
            _flush(each)
        _flush(temporary)
        if path.exists():  # the same step again, after a resume
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush(self.folder)
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if not self.keep_every or _step(old) % self.keep_every:
                shutil.rmtree(old, ignore_errors=True)


def flatten(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors as `weight:state`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}:{key}"] = torch.as_tensor(value).detach()
    return tensors


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = Path(folder).glob(f"{PREFIX}*")
    return sorted(path for path in found if path.suffix != ".tmp" and path.is_dir())


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def checkpoints_of(run: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run) / CHECKPOINTS


def find_model(folder: str | Path) -> Path:
    """A model folder, the newest checkpoint of a run folder, or a model on a hub (`owner/name`)."""
    folder = Path(folder)
    if files_of(folder):
        return folder
    newest = latest(checkpoints_of(folder))
    if newest is None and (name := hub.name_of(folder)) is not None:
        return find_model(hub.fetch(name))
    if newest is None:
        raise UserError(f"no model at {folder}; give a model folder or the --out of mmpt train")
    return newest


def find_recipe(folder: Path) -> Path | None:
    """recipe.toml of a model folder, or of the run that a checkpoint belongs to."""
    places = [folder, folder.parents[1]] if folder.parent.name == CHECKPOINTS else [folder]
    return next((p / "recipe.toml" for p in places if (p / "recipe.toml").is_file()), None)


def begun_with(folder: str | Path, vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary of a run's newest checkpoint, or `vocabulary` when it has none.

    The ids are the same in both, but the codes that training data uses may differ: data that was
    encoded since must not change what a run that goes on learns.
    """
    path = latest(folder)
    if path is None or not (path / "vocabulary.json").is_file():
        return vocabulary
    begun = Vocabulary.load(path / "vocabulary.json")
    vocabulary.check(begun.fingerprint, what=f"the run at {path}")
    return begun


def find_processor(*folders: Path | None) -> ProcessorSettings | None:
    """The settings in the first of the folders that has any."""
    for folder in folders:
        if folder is not None and (folder / PROCESSOR_FILE).is_file():
            return ProcessorSettings.load(folder)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
