"""A text model over more ids, and with experts for more media.

Ids of text keep their rows. New ids (structure, sizes, codes) get rows that are drawn from the mean
and the covariance of the old ones: a new id is as
likely as an old one, and no two are alike. `<bod>` and `<eod>` begin as what the text model has for
the same purpose.

Every group of experts begins as a copy of the model's own: of its feed-forward layer, or of all of
its experts and their router. So an id of a new medium is first computed as one of text would be,
and no text changes. `shared` groups serve all media with one copy.
"""

from dataclasses import replace

import torch

from mmpt.config import UserError
from mmpt.convert.text_model import TextModel
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.vocab import Vocabulary

GROUPS = {"text": ("text",), "visual": ("image", "video"), "speech": ("speech",)}
JITTER = 1e-6  # of the mean variance, where the old rows do not span all directions


def extend(
    source: TextModel, vocabulary: Vocabulary, *, shared: bool = False, seed: int = 0
) -> Decoder:
    """The text model over the ids of a vocabulary; its rows that are no text ids are left out."""
    old = source.config
    if vocabulary.num_text > old.vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary.num_text} ids, the model {old.vocab_size}; they do not "
            "belong together"
        )
    everything: GroupConfig = old.groups["all"]
    groups = {n: replace(everything, modalities=served) for n, served in GROUPS.items()}
    config = replace(
        old,
        vocab_size=len(vocabulary),
        vocabulary=vocabulary.fingerprint,
        groups=old.groups if shared else groups,
    )
    tensors = _copy_experts(source.tensors, config)
    for name in {"embedding", "head"} & tensors.keys():
        text = tensors[name][: vocabulary.num_text]
        new = draw_rows(text, len(vocabulary) - len(text), seed=seed)
        for structure, token in (("<bod>", source.begin), ("<eod>", source.end)):
            if token is not None and token < len(text):
                new[vocabulary.structure_id(structure) - len(text)] = text[token]
        tensors[name] = torch.cat([text, new])
    model = Decoder(config)
    model.load_state_dict(tensors, assign=True)
    return model


def draw_rows(old: torch.Tensor, count: int, *, seed: int) -> torch.Tensor:
    """`count` rows of normal noise with the mean and the covariance of `old` (rows, width).

    With one seed, the rows of two matrices are drawn alike: those of one id in an embedding and in
    a head.
    """
    noise = torch.randn(count, old.shape[1], generator=torch.Generator().manual_seed(seed))
    exact = old.float()
    mean = exact.mean(0)
    covariance = ((exact - mean).T @ (exact - mean) / len(old)).double()
    jitter = JITTER * covariance.diagonal().mean() + torch.finfo(torch.float32).tiny
    factor = torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance)))
    return (mean + noise @ factor.T.float()).to(old.dtype)


def _copy_experts(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in tensors.items():
        before, mark, after = name.partition(".groups.all.")
        for group in config.groups if mark else ():
            made[f"{before}.groups.{group}.{after}"] = tensor.clone()
        if not mark:
            made[name] = tensor
    return made
