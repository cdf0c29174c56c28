"""Train a small image codec on the sampler, and rebuild pictures that it never saw.

Run: python examples/12_train_a_codec.py [steps=2000 batch=32 ...]
"""

import sys
from pathlib import Path

import numpy as np

import mmpt
from mmpt.data.shards import Quarantine, read_documents
from mmpt.data.sources import shards_of
from mmpt.tokenizers import load
from mmpt.tokenizers.image import from_pixels, to_pixels
from mmpt.tokenizers.train import train

recipe = Path(__file__).parents[1] / "tokenizers/image-f8/recipe.toml"
small = ["image.encoder_width=48", "image.decoder_width=64", "image.decoder_blocks=1"]
out = Path("runs/examples/my-codec")
train(recipe, [*small, "steps=300", "batch=8", "warmup=20", "ema=0.99", *sys.argv[1:]], out=out)

codec = load(str(out))
documents = read_documents(shards_of("sampler", "heldout"), Quarantine())
parts = (part for document in documents for part in document.parts)
unseen = [part.pixels for part in parts if isinstance(part, mmpt.Image)]
pictures = np.stack([pixels for pixels in unseen if pixels.shape == (64, 64, 3)][:8])
codes = codec.encode(to_pixels(pictures))
rebuilt = from_pixels(codec.decode(codes))
error = np.square(rebuilt.astype(float) - pictures).mean()
psnr = 10 * np.log10(255**2 / error)
mmpt.Image(np.concatenate([np.hstack([*pictures]), np.hstack([*rebuilt])])).save(
    out / "rebuilt.png"
)
print(f"{codec.fingerprint}: {tuple(codes.shape[1:])} codes a picture, {psnr:.2f} dB PSNR")
print(f"look at {out}/rebuilt.png; image-f8 itself took 6,000 steps of 32")
