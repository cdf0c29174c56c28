"""Model cards, written from what a model folder holds: what it is, and how to open it."""

import json
import re
from pathlib import Path

from mmpt.config import UserError, write_atomic
from mmpt.hub import holds, shipped
from mmpt.model.weights import fingerprint, read_config
from mmpt.processor import ProcessorSettings
from mmpt.tokenizers.base import codec_folder
from mmpt.vocab import Modality, Vocabulary

CARD, RECIPE = "README.md", "recipe.toml"
NOBODY = "owner/name"  # until it is on a hub


def write_card(folder: str | Path, *, name: str = NOBODY, license: str | None = None) -> None:
    """Write README.md into a model folder; in one that is there only name and licence change.

    name: on the hub, where the card's example has none yet. license: of the weights, as hubs spell
    it (`apache-2.0`); None leaves it, and is `unknown` in a new card: nothing in a folder says
    which one holds. Raises UserError for a folder that is no model.
    """
    from huggingface_hub import ModelCard

    path = Path(folder) / CARD
    if path.is_file():
        text = path.read_text().replace(_opening(NOBODY), _opening(name))
    else:
        text = _card(Path(folder), name)
    if license is not None:
        card = ModelCard(text, ignore_metadata_errors=True)
        card.data.license = license  # type: ignore[attr-defined] # fields of a card are made as it is read
        text = str(card)
    write_atomic(path, text)


def licence_of(codec: str) -> str:
    """That of a codec (a name or a folder): of mmpt, or what the header of its card says."""
    folder = codec_folder(codec)
    if holds("tokenizers") and folder.resolve().parent == shipped("tokenizers").resolve():
        return "Apache-2.0, part of mmpt"
    from huggingface_hub import ModelCard

    try:
        card = ModelCard((folder / CARD).read_text(), ignore_metadata_errors=True)
        stated = card.data.to_dict().get("license")
    except (OSError, ValueError):
        stated = None
    return stated or "not stated"


def public_recipe(text: str) -> str:
    """A recipe without the folders of the machine that it ran on: absolute paths keep their end."""
    return re.sub(r"""(["'])(?:/|~)[^"'\n]*/(?=[^"'\n/]*\1)""", r"\1", text)


def _opening(name: str) -> str:
    return f'mmpt.load("{name}")'


def _card(folder: Path, name: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    from mmpt.plan.workload import on_meta  # which trains, and training exports

    model = on_meta(config := read_config(folder)[0])
    media = [Modality.TEXT]
    if (folder / "vocabulary.json").is_file():
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        media = [modality for modality in Modality if vocabulary.has(modality)]
    words = [modality.name.lower() for modality in media]
    adapted = any(group.noisy for group in config.groups.values())
    data = ModelCardData(
        license="unknown",
        library_name="mmpt",
        pipeline_tag="any-to-any",
        tags=["mmpt", *words, *(["discrete-diffusion"] if adapted else [])],
    )
    groups = [
        f"| {key} | {', '.join(group.modalities)} | {group.num_experts} | {group.router} |"
        for key, group in config.ordered_groups.items()
    ]
    active = [f"{model.num_active_parameters(m):,} for {m.name.lower()}" for m in media]
    ways = "id by id, and media in parallel (discrete diffusion)" if adapted else "id by id"
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# A model of {', '.join(words)}",
        "",
        f"It reads and writes all of it as one stream of ids, and decodes {ways}. Made with mmpt.",
        "",
        "```python",
        "import mmpt",
        "",
        f"model = {_opening(name)}",
        f'[answer] = model("A red apple:", to="{words[-1]}")',
        "```",
        "",
        "## Model",
        "",
        f"- **Parameters**: {model.num_parameters:,}; used by an id: {'; '.join(active)}",
        f"- **Shape**: {config.num_layers} layers of width {config.width}, {config.num_heads} heads"
        f" ({config.num_kv_heads} of keys), {config.vocab_size:,} ids",
        f"- **Fingerprint** of the weights: `{fingerprint(folder)}`; of the vocabulary: "
        f"`{config.vocabulary}`",
        "",
        "| experts | serve | number | router |",
        "|---|---|---|---|",
        *groups,
        *_codecs(folder),
        *_recipe(folder),
        "",
    ]
    return str(ModelCard("\n".join(lines), ignore_metadata_errors=True))


def _codecs(folder: Path) -> list[str]:
    try:
        names = ProcessorSettings.load(folder).tokenizers
    except UserError:
        return []  # a model of ids alone
    rows = []
    for name in names:
        config = json.loads((codec_folder(name) / "config.json").read_text())
        kind = config.get("kind") or config.get("model_type")
        rows.append(f"| {Path(name).name} | {kind} | {licence_of(name)} |")
    return ["", "## Tokenizers", "", "| name | kind | licence |", "|---|---|---|", *rows]


def _recipe(folder: Path) -> list[str]:
    if not (folder / RECIPE).is_file():
        return []
    return ["", "## Recipe", "", "```toml", (folder / RECIPE).read_text().strip(), "```"]
