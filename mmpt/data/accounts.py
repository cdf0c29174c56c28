"""What became of the samples of a mix: used + filtered + quarantined is what there was."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from mmpt.data.order import ShardSource
from mmpt.data.pipeline_source import COUNTS, PipelineSource
from mmpt.data.tokens import TokenShard


def accounts(
    sources: Mapping[str, Any], states: Collection[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By source: of token shards once for all epochs, of pipelines so far in these streams.

    "filtered" is by why; held-out documents are among it. "promised", where indexes said it,
    is the sum. A pipeline has "passes", which are its iterations, and "lost" pieces beside it.
    """
    rows = {}
    for name, source in sources.items():
        if isinstance(source, ShardSource):
            rows[name] = _of_shards(source)
        elif isinstance(source, PipelineSource):
            rows[name] = _of_pipeline([state["live"][name] for state in states])
    return rows


def shard_account(shard: TokenShard) -> dict[str, Any]:
    """What `mmpt encode` noted of a shard; its held-out documents are used. None: not indexed."""
    notes = shard.notes
    return {
        "used": len(shard) - notes.get("augmented", 0),
        "filtered": dict(notes.get("filtered", {})),
        "quarantined": notes.get("bad", 0),
        "promised": notes.get("promised"),
    }


def _of_shards(source: ShardSource) -> dict[str, Any]:
    rows = [shard_account(shard) for shard in source.shards]
    whole = sum(row["used"] for row in rows)
    # a second view is never of a held-out document
    used = len(source) - sum(shard.notes.get("augmented", 0) for shard in source.shards)
    filtered: Counter[str] = Counter()
    for row in rows:
        filtered.update(row["filtered"])
    filtered["held out"] += whole - used
    promised = [row["promised"] for row in rows]
    return {
        "used": used,
        "filtered": dict(+filtered),
        "quarantined": sum(row["quarantined"] for row in rows),
    } | ({} if None in promised else {"promised": sum(promised)})


def _of_pipeline(counts: list[Mapping[str, int]]) -> dict[str, Any]:
    total = {key: sum(each[key] for each in counts) for key in COUNTS}
    held, bad = total.pop("heldout"), total.pop("bad")
    return total | {"filtered": {"held out": held} if held else {}, "quarantined": bad}
