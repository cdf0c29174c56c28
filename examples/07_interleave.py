"""Parts in any order: you place the slots, or the model decides what comes.

Run: python examples/07_interleave.py [MODEL]
"""

import sys
from pathlib import Path

import mmpt
from mmpt import Generate

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
out = Path("runs/examples")

story = model(
    "red apple",
    Generate("image", guidance=2.0),
    Generate("speech", max_seconds=2.0),
    "It moves:",
    Generate("video", frames=9, decoder="dida"),
    "In other words:",
    Generate("text", max_ids=16, stop=("\n",)),
    seed=1,
)
print("slots:", ", ".join(type(part).__name__ for part in story))
print("page: ", ", ".join(type(part).__name__ for part in story.document))
story.save(out / "story")  # a file a part, and result.json, which holds all of it

free = model("A red apple and", seed=3, max_ids=160, max_parts=4)
for part in free:
    print("the model chose", type(part).__name__, getattr(part, "text", ""))
free.save(out / "free")
