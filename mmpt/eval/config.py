"""What is measured while a run goes on, as the table `[evaluate]` of a recipe says it."""

import math
import re
from dataclasses import dataclass, field

from mmpt.config import UserError
from mmpt.vocab import Modality


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A linear classifier on hidden states: of the codes of `medium` alone, what `pattern` finds.

    pattern: a regular expression that is searched in each document's key; what its first group
    holds is the label, and documents in which it finds nothing are left out.
    """

    medium: str
    pattern: str

    def __post_init__(self) -> None:
        known = [modality.name.lower() for modality in Modality]
        if self.medium not in known:
            raise UserError(f"a probe's medium is {self.medium!r}; choose from {', '.join(known)}")
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(f"a probe's pattern {self.pattern!r} is no pattern: {error}") from None
        if groups < 1:
            raise UserError(f"a probe's pattern {self.pattern!r} has no group; put ( ) around it")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How often, and on how much, held-out documents are looked at."""

    every: int = 0  # steps, and at the last one; 0: never
    growth: float = 0.0  # 0.1: after `every` steps, and then whenever they are 10% more
    documents: int = 32  # held-out ones of each source and medium, evenly spread
    candidates: int = 4  # that a choice is among; 0: no choices
    shards: tuple[
        str, ...
    ] = ()  # token shards or folders; those beside the vocabulary unless given
    probes: dict[str, ProbeConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("growth", 0), ("documents", 1), ("candidates", 2)):
            value = getattr(self, name)
            if value < least and (name != "candidates" or value):
                raise UserError(f"evaluate.{name} = {value}; use at least {least}")

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after this step, be it the last or not."""
        if not self.every or not self.growth:
            return bool(self.every) and step % self.every == 0

        def place(step: int) -> int:
            return math.floor(math.log(step / self.every) / math.log1p(self.growth))

        return step == self.every or (step > self.every and place(step) > place(step - 1))
