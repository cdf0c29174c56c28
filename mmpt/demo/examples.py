"""What can be tried by a click, from held-out pictures and sounds where it needs one."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmpt import hub
from mmpt.data.quarantine import Quarantine
from mmpt.data.shards import read_documents
from mmpt.data.sources import sampler_shards
from mmpt.demo.conversation import Form
from mmpt.parts import Audio, Image, Part, Text
from mmpt.pipeline import Pipeline
from mmpt.results import Medium
from mmpt.vocab import Modality

PICTURE, SOUND = "1f35d", "prompt-hello-world"  # documents of the sampler that no model saw


@dataclass(frozen=True)
class Example:
    """parts: what is asked. to: what it is answered with."""

    label: str
    parts: list[Part]
    to: Medium
    form: Form = "conversation"


def list_examples(pipeline: Pipeline) -> Sequence[Example]:
    """Those that this model has the tokenizers for, and this installation the files."""
    examples = [
        Example("Draw a red apple", [Text("Draw a red apple.")], "image"),
        Example("Say: good morning", [Text("Say: good morning")], "speech"),
        Example("A heart that beats", [Text("beating heart")], "video", "document"),
    ]
    for part in _held_out():
        if isinstance(part, Image):
            examples.append(Example("What is this picture?", [part, Text("What is this?")], "text"))
            grey = [part, Text("Take the colours away.")]
            examples.append(Example("Take its colours away", grey, "image"))
        if isinstance(part, Audio):
            heard = [part, Text("What did I say?")]
            examples.append(Example("What did I say?", heard, "text"))
    kinds = {Image: Modality.IMAGE, Audio: Modality.SPEECH}
    known = pipeline.processor.vocabulary
    return [
        each
        for each in examples
        if (each.to == "text" or known.has(Modality[each.to.upper()]))
        and all(known.has(kinds[type(part)]) for part in each.parts if type(part) in kinds)
    ]


def _held_out() -> list[Part]:
    if not hub.holds("data/sampler"):
        return []
    return [
        part
        for document in read_documents(sampler_shards("heldout"), Quarantine())
        if document.key in (PICTURE, SOUND)
        for part in document.parts
        if not isinstance(part, Text)
    ]
