"""Raw shards to token shards: pictures, clips, sound and text as integers that a model trains on.

Run: python examples/13_encode_shards.py [SHARD.tar ...]
"""

import sys
from pathlib import Path

from mmpt.data.encode import encode
from mmpt.data.sources import sampler_shards
from mmpt.data.tokens import open_shards
from mmpt.processor import DEFAULT_TOKENIZERS
from mmpt.vocab import Vocabulary

if __name__ == "__main__":  # processes that encode import this file anew
    out = Path("runs/examples/tokens")
    shards = sys.argv[1:] or [str(shard) for shard in sampler_shards()]
    done = encode(shards, out=out, tokenizers=DEFAULT_TOKENIZERS)
    print(f"{done['documents']} documents, {done['bad']} bad; codes: {done['codes']}")

    vocabulary = Vocabulary.load(out / "vocabulary.json")
    first = next(document for shard in open_shards([out], vocabulary) for document in shard)
    for segment in first.segments:
        print(f"{first.key}: {segment.modality.name.lower()} {segment.codes.shape}")
