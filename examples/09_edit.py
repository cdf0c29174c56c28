"""Edits: told in words, a picture that goes on beside a cut, and another end of a clip.

Run: python examples/09_edit.py [MODEL]
"""

import sys
from pathlib import Path

import mmpt
from mmpt import Edit

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
out = Path("runs/examples/edits")

# a conversation: each answer is the next picture to change
turns = [{"role": "user", "content": "Draw a red apple."}]
for number, wish in enumerate(["Make the background blue.", "Turn it upside down."]):
    answer = model(*turns, to="image", guidance=2.0, seed=number)
    answer[0].save(out / f"{number}-before.png")
    turns += [answer.message, {"role": "user", "content": wish}]
[last] = model(*turns, to="image", guidance=2.0)
last.save(out / "told.png")

# the left half, and 32 new pixels on the right of it
half = mmpt.Image(last.pixels[:, :32])
[whole] = model("red apple", edit=Edit.extend(half, right=32), num_passes=8)
whole.save(out / "another-half.png")

# the first frames stay, the others are made anew
[clip] = model("red apple", to="video", frames=17, decoder="dida", seed=1)
clip.save(out / "clip.mp4")
[ended] = model("red apple", edit=Edit.stretch(clip, start=0.5, stop=9.0), num_passes=8, seed=2)
ended.save(out / "another-end.mp4")
print(f"look at {out}")
