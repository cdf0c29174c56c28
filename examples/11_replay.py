"""Files know how they were made: make one again, to the last bit, and look at its ids.

Run: python examples/11_replay.py [MODEL]
"""

import sys
from pathlib import Path

import mmpt
from mmpt.replay import replay
from mmpt.ribbon import inspect_file

folder = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "mmpt-mini"
out = Path("runs/examples")
model = mmpt.load(str(folder))
results = {
    "replayed.png": model("red apple", to="image", seed=7, guidance=2.0),
    "replayed.wav": model("red apple", to="speech", seed=7, max_seconds=2.0),
}
for name, result in results.items():
    result.save(out / name)
    again = replay(out / name, model=folder)  # also: mmpt replay runs/examples/replayed.png
    print(f"{name}: {again['ids']} ids, {again['replayed']}")

page = inspect_file(out / "replayed.png", model=folder)
print(f"look at {page['page']}: every id, its likelihood, and the experts that saw it")
