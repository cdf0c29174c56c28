"""Events while a picture is decoded in parallel: each pass refines all of its 64 codes at once.

Run: python examples/03_watch_it_denoise.py [MODEL]
"""

import sys
from pathlib import Path

import mmpt
from mmpt.results import PartDone, Preview

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
out = Path("runs/examples")
for event in model.stream("yellow star", to="image", decoder="dida", num_passes=8, guidance=2.0):
    if isinstance(event, Preview):
        event.part.save(out / f"star-{event.done}-of-{event.total}.png")
    elif isinstance(event, PartDone):
        event.part.save(out / "star.png")
print(f"look at {out}/star-*.png")
