"""Bring your own text model: Llama, Mistral, Qwen or OLMoE, given ids for pictures and sound.

Run: python examples/16_own_text_model.py [FOLDER that transformers saved; else a random model]
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mmpt
from mmpt.convert.init import init
from mmpt.tokenizers.text import text_ids
from mmpt.train.upcycle import upcycle_command

out = Path("runs/examples/own")
shutil.rmtree(out, ignore_errors=True)
source = Path(sys.argv[1]) if sys.argv[1:] else out / "llama"
if not sys.argv[1:]:
    sizes = LlamaConfig(vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    LlamaForCausalLM(sizes).save_pretrained(source)
    shutil.copy(Path(__file__).parents[1] / "tokenizers/text-2k/tokenizer.json", source)

print(init(from_=source, out=out / "start", codecs=["image-f8", "video-f8t4", "speech-12hz"]))
print(upcycle_command(out / "start", experts="text=4,visual=2", out=out / "grown"))

model = mmpt.load(str(out / "grown"))
ids = torch.from_numpy(text_ids(model.processor.text, "A red apple on a red table"))[None]
with torch.inference_mode():
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    ours = model.model.logits(model.model(ids, modality=torch.zeros_like(ids)))
same = (ours[..., : ids.max() + 1] - theirs[..., : ids.max() + 1]).abs().max()
print(f"largest difference of a logit over text: {same:.1e}")  # now train it: start = ".../grown"
