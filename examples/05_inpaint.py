"""Inpainting: a box of a picture is made anew, the rest is held, and the new codes fit it.

Run: python examples/05_inpaint.py [MODEL]
"""

import sys
from pathlib import Path

import numpy as np

import mmpt

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
[apple] = model("red apple", to="image", seed=1, guidance=2.0)

right_half = mmpt.Edit.box(apple, top=0, left=32, height=64, width=32)
changed = [model("red apple", edit=right_half, seed=seed, num_passes=8)[0] for seed in range(3)]

pictures = [apple, *changed]
out = Path("runs/examples/inpainted.png")
mmpt.Image(np.concatenate([picture.pixels for picture in pictures], axis=1)).save(out)
left = np.abs(changed[0].pixels[:, :16].astype(int) - apple.pixels[:, :16]).mean()
right = np.abs(changed[0].pixels[:, 32:].astype(int) - apple.pixels[:, 32:]).mean()
print(f"mean change of a pixel: {left:.1f} far from the box, {right:.1f} inside it")
print(f"look at {out}: the picture, then three other right halves")
