"""A model out of a run: one folder of safetensors and JSON that everything else reads."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from mmpt.card import CARD, RECIPE, public_recipe, write_card
from mmpt.config import UserError, write_atomic
from mmpt.model.transformer import Decoder
from mmpt.model.weights import files_of, fingerprint, read_tensors
from mmpt.train.checkpoint import find_model, find_processor, find_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    run: Path,
    *,
    out: Path,
    average: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """Write the model of a run or checkpoint as one folder, whatever number of ranks trained it.

    RUN is the --out of a training, one of its checkpoints or a model folder. The folder gets
    model.safetensors, config.json, vocabulary.json, processor.json, recipe.toml and a card;
    generating, evaluating, adapting and `start` in a recipe read it. --average: the averaged
    weights, where the recipe had `ema`. --dtype bf16 halves the file.
    """
    folder = find_model(run)
    model = Decoder.load(folder)
    if average:
        if not files_of(folder, "average"):
            raise UserError(f"{folder} has no averaged weights; train with ema = 0.999")
        model.load_state_dict(read_tensors(folder, "average"), strict=False)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    model.to(DTYPES[dtype]).save(out)
    if (folder / "vocabulary.json").is_file():
        shutil.copyfile(folder / "vocabulary.json", out / "vocabulary.json")
    if (settings := find_processor(folder)) is not None:
        settings.save(out)
    if (recipe := find_recipe(folder)) is not None:
        write_atomic(out / RECIPE, public_recipe(recipe.read_text()))
    if (folder / CARD).is_file():
        shutil.copyfile(folder / CARD, out / CARD)
    write_card(out)
    return {
        "model": str(out),
        "from": str(folder),
        "fingerprint": fingerprint(out),
        "parameters": model.num_parameters,
        "bytes": (out / "model.safetensors").stat().st_size,
    }
