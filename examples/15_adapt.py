"""Teach the model of 14_pretrain.py to denoise whole blocks; its other answers stay bit-equal.

Run: python examples/15_adapt.py [STEPS]
"""

import sys
from pathlib import Path

import mmpt
from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.train.adapt import adapt
from mmpt.train.optim import OptimConfig
from mmpt.train.recipe import AdaptRecipe
from mmpt.vocab import Vocabulary

tokens, start = Path("runs/examples/tokens"), "runs/examples/pretrained"
recipe = AdaptRecipe(
    vocabulary=str(tokens / "vocabulary.json"),
    start=start,
    data=DataConfig(
        rows=4, length=256, sources={"sampler": SourceConfig(shards=(f"{tokens}/*.tokens.tar",))}
    ),
    optim=OptimConfig(lr=2e-3, warmup=10),
    max_noisy=256,
    steps=int(sys.argv[1]) if sys.argv[1:] else 100,
)
run = "runs/examples/adapted"
adapt(recipe, run, vocabulary=Vocabulary.load(tokens / "vocabulary.json"))

before, after = mmpt.load(start), mmpt.load(run)
one, other = (model("red apple", to="image", seed=1)[0].pixels for model in (before, after))
print("one id at a time as before:", bool((one == other).all()))
[picture] = after("red apple", to="image", decoder="dida", num_passes=8, seed=1)
picture.save("runs/examples/adapted.png")
