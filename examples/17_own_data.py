"""Bring your own data: any webdataset is a source; its samples are encoded while they are read.

Run: python examples/17_own_data.py
"""

from pathlib import Path

import numpy as np
import webdataset as wds

import mmpt
from mmpt.data.loader import DataConfig, SourceConfig
from mmpt.model.config import ModelConfig
from mmpt.processor import Processor
from mmpt.train.pretrain import train
from mmpt.train.recipe import TrainRecipe, fit_model

out = Path("runs/examples/own-data")
processor = Processor.load()
processor.save_settings(out)
processor.vocabulary.save(out / "vocabulary.json")
with wds.TarWriter(f"{out}/squares.tar") as writer:  # put your own pictures and words here
    for red in range(256):
        png = mmpt.Image(np.full((64, 64, 3), (red, 0, 0), dtype=np.uint8)).encode()
        writer.write({"__key__": f"square-{red}", "png": png, "txt": f"a square of red {red}"})


def squares(stream: int, num_streams: int) -> wds.WebDataset:
    """What each of `num_streams` readers gets, as webdataset gives it."""
    data = wds.WebDataset(f"{out}/squares.tar", shardshuffle=False, nodesplitter=None)
    return data.slice(stream, None, num_streams)


source = SourceConfig(pipeline="__main__:squares", processor=str(out))
data = DataConfig(rows=2, length=256, buffer=16, sources={"squares": source})
model = fit_model(ModelConfig(vocab_size=1, num_layers=2), processor.vocabulary)
recipe = TrainRecipe(vocabulary=f"{out}/vocabulary.json", model=model, data=data, steps=20)
result = train(recipe, out / "run", vocabulary=processor.vocabulary)
print(f"{result.counters.tokens:,} ids; samples: {result.data['samples']['squares']}")
