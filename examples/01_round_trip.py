"""A picture, a clip and a sound to codes and back: what a model sees of them.

Run: python examples/01_round_trip.py
"""

from pathlib import Path

import torch

from mmpt.data.shards import Quarantine, read_documents
from mmpt.data.sources import sampler_shards
from mmpt.parts import Audio, Image, Video
from mmpt.processor import Processor

out = Path("runs/examples")
processor = Processor.load()
wanted = {Image: "picture.png", Video: "clip.webp", Audio: "sound.wav"}
for document in read_documents(sampler_shards("heldout"), Quarantine(None)):
    for part in document.parts:
        name = wanted.pop(type(part), None)
        if name is None:
            continue
        [segment] = processor.encode_parts([part])
        [made] = processor.decode_segments([segment])
        part.save(out / f"original-{name}")
        made.save(out / f"decoded-{name}")
        print(f"{name}: {segment.codes.size} codes of shape {segment.codes.shape} in {out}")
    if not wanted:
        break
print(f"torch {torch.__version__}, vocabulary of {len(processor.vocabulary):,} ids")
