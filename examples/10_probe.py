"""A probe: can a linear classifier tell from hidden states which voice speaks?

Run: python examples/10_probe.py [MODEL [DOCUMENTS]]
"""

import re
import sys
from pathlib import Path

import mmpt
from mmpt.data.shards import Quarantine, read_documents
from mmpt.data.sources import Split, shards_of
from mmpt.data.tokens import EncodedDocument
from mmpt.eval.passes import Passes
from mmpt.eval.probe import measure_probe
from mmpt.vocab import Modality

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
most = int(sys.argv[2]) if sys.argv[2:] else 100
processor = model.processor


def labelled(split: Split) -> list[tuple[EncodedDocument, str]]:
    """Documents as codes, each with the voice that its key names."""
    shards, found = [s for s in shards_of("sampler", split) if "voices" in s.name], []
    for document in read_documents(shards, Quarantine()):
        voice = re.fullmatch(r"voices-[0-9a-f]+-(.+)", document.key)
        if voice and len(found) < most:
            codes = processor.encode_parts(document.parts)
            found.append((EncodedDocument(document.key, document.base, "any", codes), voice[1]))
    return found


passes = Passes(model.model, processor.vocabulary)
sets = labelled("train"), labelled("heldout")
told = measure_probe(passes, processor.vocabulary, Modality.SPEECH, *sets, processor.separator)
print(f"voices told apart: {told}")
