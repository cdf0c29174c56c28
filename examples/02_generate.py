"""Every direction with one call, by the model that comes with mmpt, or another one.

Run: python examples/02_generate.py [runs/quickstart/model]
"""

import sys
from pathlib import Path

import mmpt

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
out = Path("runs/examples")

[picture] = model("red apple", to="image", seed=1, guidance=2.0)
picture.save(out / "apple.png")

[faster] = model("red apple", to="image", seed=1, guidance=2.0, decoder="dida", num_passes=8)
faster.save(out / "apple-in-8-passes.png")

[label] = model(picture, to="text", max_ids=16)
print("the picture is called:", label.text)

[speech] = model("red apple", to="speech")
speech.save(out / "apple.wav")

[clip] = model("red apple", to="video", frames=17, decoder="dida")
clip.save(out / "apple.mp4")

for part in model("A red apple and", seed=3, max_ids=120):  # the model decides what comes
    print(type(part).__name__, getattr(part, "text", ""))
print(f"the rest is in {out}")
