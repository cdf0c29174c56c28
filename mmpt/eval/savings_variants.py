"""The variants that `mmpt savings` compares: short lists of changes to the model of its recipe.

All have one active expert of the recipe's width for an id, so the same operations up to a router's.
A change is `key=value` of `ModelConfig`; `like=NAME` begins with the changes of another variant. So
an option of the model joins the comparison by its name: gated:like=4t2v2s,gated_attention=true.
"""

import re
from collections.abc import Iterable, Mapping

from mmpt.config import UserError, from_dict, set_override, to_dict
from mmpt.model.config import ModelConfig

DENSE = "dense"  # what the others are compared with
SERVES = {
    "all": ["text", "image", "video", "speech"],
    "text": ["text"],
    "visual": ["image", "video"],
    "speech": ["speech"],
}


BY_ID = "router = 'token_choice'"
BY_EXPERT = "router = 'expert_choice', router_noise = true, causal = 'auxiliary'"


def _groups(routing: str = BY_ID, **num_experts: int) -> str:
    """These groups instead of others; one of a single expert needs no router."""
    tables = [
        f"{name} = {{modalities = {SERVES[name]}, num_experts = {number}, "
        + (routing if number > 1 else "router = 'hard'")
        + "}"
        for name, number in num_experts.items()
    ]
    return f"groups={{{', '.join(tables)}}}"


VARIANTS: dict[str, tuple[str, ...]] = {
    DENSE: (_groups(all=1),),
    "shared-8": (_groups(all=8),),
    "1t1v1s": (_groups(text=1, visual=1, speech=1),),
    "4t2v2s": (_groups(text=4, visual=2, speech=2),),
    "moma": (_groups(BY_EXPERT, text=4, visual=2, speech=2),),
    "mot": ("like=1t1v1s", "untied_attention=true"),
}


def parse_variants(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """NAME:key=value,key=value for each variant -> its changes. UserError for what is none."""
    found = {}
    for text in texts:
        name, colon, changes = text.partition(":")
        if not colon or not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(
                f"--variant {text!r} is not NAME:key=value,...; NAME has letters, digits and . + -"
            )
        found[name] = tuple(re.split(r",(?=[\w.]+=)", changes))
    return found


def variant_model(
    name: str, base: ModelConfig, more: Mapping[str, tuple[str, ...]] | None = None
) -> ModelConfig:
    """The model of a variant: one of `more`, else of those that are known here.

    Raises UserError for an unknown variant, and for an option that this model does not have.
    """
    table = to_dict(base)
    for change in _changes(name, VARIANTS | dict(more or {}), ()):
        set_override(table, change)
    return from_dict(ModelConfig, table, where=f"variant {name}")


def _changes(
    name: str, known: Mapping[str, tuple[str, ...]], users: tuple[str, ...]
) -> Iterable[str]:
    if name not in known or name in users:
        what = f"variant {users[-1]!r} is like " if users else "there is no variant "
        why = "which is like it" if name in users else f"the variants are {', '.join(known)}"
        raise UserError(f"{what}{name!r}; {why}")
    for change in known[name]:
        if change.startswith("like="):
            yield from _changes(change.removeprefix("like="), known, (*users, name))
        else:
            yield change
