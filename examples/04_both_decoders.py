"""Pictures of words by both decoders: above one code at a time, below all codes in 8 passes.

Run: python examples/04_both_decoders.py [MODEL]
"""

import sys
import time
from pathlib import Path

import numpy as np

import mmpt

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
words = [["red apple"], ["yellow star"], ["blue heart"], ["green book"]]
rows, seconds = [], {}
for decoder in ("ar", "dida"):
    begin = time.perf_counter()
    results = model.batch(
        words, to="image", seeds=range(4), decoder=decoder, num_passes=8, guidance=2.0
    )
    seconds[decoder] = time.perf_counter() - begin
    rows.append(np.concatenate([picture.pixels for [picture] in results], axis=1))

out = Path("runs/examples/both-decoders.png")
mmpt.Image(np.concatenate(rows)).save(out)
for decoder, time_taken in seconds.items():
    print(f"{decoder}: {time_taken:.2f} s for {len(words)} pictures")
print(f"look at {out}")
