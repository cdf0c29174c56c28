"""Put a model, or a codec, on a hub."""

import json
from pathlib import Path
from typing import Any

from mmpt import hub
from mmpt.config import UserError


def push(
    model: Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license_: str | None = None,
    message: str = "Push with mmpt",
) -> dict[str, Any]:
    """Put MODEL on the hub as NAME, owner/name, with a card that says what it is.

    MODEL is a model folder, a run or a folder of a tokenizer. Log in first (`hf auth login`, or
    HF_TOKEN); HF_ENDPOINT is another hub. The card is README.md of the folder where it has one,
    else it is written from what the folder says. --license: of the weights, as hubs spell it, such
    as apache-2.0. Tokenizers that mmpt does not ship go along. --private: refused where the
    repository is there and public. --revision: the branch, which is made where it is not there.
    """
    place = hub.HubName.of(name, revision)
    options = {"private": private or None, "message": message}
    if _is_codec(model):
        address = hub.push(model, place, **options)
    else:
        from mmpt.pipeline import Pipeline

        pipeline = Pipeline.load(model)
        revision = place.revision
        address = pipeline.push_to_hub(place.repo, revision=revision, license=license_, **options)
    return {"pushed": str(model), "to": str(place), "commit": address}


def _is_codec(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False  # a run, or nothing: opening it says more
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json is neither of a model nor of a tokenizer")
    return "kind" in config or "model_type" in config
