"""Pretrain a small decoder, with experts for each medium, on the shards of 13_encode_shards.py.

Run: python examples/14_pretrain.py [STEPS]
"""

import sys
from pathlib import Path

from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.train.optim import OptimConfig
from mmpt.train.pretrain import train
from mmpt.train.recipe import TrainRecipe, fit_model
from mmpt.vocab import Vocabulary

tokens = Path("runs/examples/tokens")
vocabulary = Vocabulary.load(tokens / "vocabulary.json")
groups = {
    "text": GroupConfig(modalities=("text",), num_experts=2, router="token_choice"),
    "visual": GroupConfig(modalities=("image", "video"), num_experts=2, router="token_choice"),
    "speech": GroupConfig(modalities=("speech",)),
}
model = ModelConfig(vocab_size=1, width=96, num_layers=3, num_heads=4, groups=groups)
recipe = TrainRecipe(
    vocabulary=str(tokens / "vocabulary.json"),
    model=fit_model(model, vocabulary),
    data=DataConfig(
        rows=4, length=256, sources={"sampler": SourceConfig(shards=(f"{tokens}/*.tokens.tar",))}
    ),
    optim=OptimConfig(lr=3e-3, warmup=10),
    steps=int(sys.argv[1]) if sys.argv[1:] else 300,
)
losses = []
run = "runs/examples/pretrained"  # run it again: an interrupted run goes on
result = train(recipe, run, vocabulary=vocabulary, on_step=lambda row: losses.append(row["loss"]))
print(f"{result.counters.step} steps, {result.counters.tokens:,} ids")
print(f"nats an id, first and last: {losses[:1]} {losses[-1:]}; the model is in {run}")
