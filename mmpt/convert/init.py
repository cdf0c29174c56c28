"""`mmpt init`: a model folder from a text model of others, for training to go on from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpt.config import UserError


def init(
    *,
    from_: Path,
    out: Path,
    codecs: Sequence[str] = ("image-f8", "video-f8t4", "speech-12hz"),
    max_side: int = 64,
    shared: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Make a model of text, images, video and speech out of a text model.

    --from: a folder as transformers saves it, with config.json, model.safetensors (or several and
    their index) and tokenizer.json; Llama, Mistral, Qwen 2 and 3, and OLMoE. Over its own ids of
    text the new model computes the same. --codecs: tokenizers of media, names or folders; their ids
    are new, with rows drawn from the mean and the covariance of the old ones by --seed. The
    feed-forward layers (OLMoE: all experts) are copied for text, for images with video, and for
    speech; --shared: one copy serves all. --out gets the model, its text tokenizer, vocabulary.json
    and processor.json. Encode data with the same tokenizers (`mmpt encode --tokenizers
    OUT/tokenizer image-f8 ...`), then train with start = OUT and no [model] in the recipe.
    """
    from mmpt.convert.extend import extend
    from mmpt.convert.text_model import read_text_model
    from mmpt.model.weights import fingerprint
    from mmpt.pipeline import save_model
    from mmpt.processor import Processor
    from mmpt.tokenizers.text import TextCodec

    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    text = TextCodec.read(from_ / "tokenizer.json")
    source = read_text_model(from_)
    text.save(out / "tokenizer")
    processor = Processor.load([str(out / "tokenizer"), *codecs], max_side=max_side)
    model = extend(source, processor.vocabulary, shared=shared, seed=seed)
    save_model(model, processor, out)
    return {
        "model": str(out),
        "from": f"{from_} ({source.kind})",
        "fingerprint": fingerprint(out),
        "parameters": model.num_parameters,
        "ids": len(processor.vocabulary),
        "text_ids": processor.vocabulary.num_text,
        "vocabulary": processor.vocabulary.fingerprint,
        "groups": {name: group.num_experts for name, group in model.config.groups.items()},
    }
