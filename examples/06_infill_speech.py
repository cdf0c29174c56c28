"""A speech infill: a second of a recorded sentence is said anew, between what is held.

Run: python examples/06_infill_speech.py [MODEL]
"""

import sys
from pathlib import Path

import mmpt
from mmpt.data.shards import Quarantine, read_documents
from mmpt.data.sources import sampler_shards
from mmpt.parts import Audio

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
shards = [shard for shard in sampler_shards("heldout") if shard.name.startswith("prompts")]
text, sound = next(
    (text, sound)
    for text, sound in (document.parts for document in read_documents(shards, Quarantine()))
    if isinstance(sound, Audio) and 2 < sound.seconds < 3
)
gap = mmpt.Edit.stretch(sound, start=0.6, stop=1.6)
[filled] = model(text, edit=gap, seed=1, num_passes=8)

out = Path("runs/examples")
sound.save(out / "said.wav")
filled.save(out / "said-anew.wav")
codes, redo = gap.encode(model.processor)
print(f"{text.text!r}: {redo.sum()} of {codes.codes.size} codes are new")
print(f"listen to {out}/said.wav and {out}/said-anew.wav")
