"""Comparison: which documents are copies of each other, over the annotations of all shards.

Held-out documents come first, then the order of shards: of a cluster that holds both, the one
that stays is held out, and no near-duplicate of it is trained on.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import write_atomic
from mmpt.data.curate.annotate import STATE, Task, digest
from mmpt.data.curate.columns import COMPARED
from mmpt.data.curate.recipe import BANDS, NUM_HASHES, ROWS, CurateRecipe

DOCUMENTS = """
create table documents as
select row_number() over (order by heldout desc, shard, number) - 1 as id, shard, number,
    text_hash, text_minhash, picture_hashes
from annotations where problem is null
"""
TEXT_COPIES = """
create table copies as
select id, min(id) over same as first, row_number() over (same order by id) - 1 as text_copy
from documents where text_hash is not null
window same as (partition by text_hash)
"""
# every text is compared with the first of each band it is in, not with all: linear in documents
NEAR_EDGES = f"""
with bands as (
    select id, band, hash(text_minhash[band * {ROWS} + 1 : band * {ROWS} + {ROWS}]) as value
    from documents join copies using (id), range({BANDS}) as bands(band)
    where text_copy = 0 and text_minhash is not null
), pairs as (
    select distinct min(id) over (partition by band, value) as a, id as b from bands
)
select a, b from pairs join documents x on x.id = a join documents y on y.id = b
where a < b and len(list_filter(list_zip(x.text_minhash, y.text_minhash), lambda z: z[1] = z[2]))
    >= $1 * {NUM_HASHES}
"""
HASHES = """
create table hashes as
select row_number() over (order by hash) - 1 as member, hash
from (select distinct unnest(picture_hashes) as hash from documents)
"""
# of k + 1 bands of bits ($2), two hashes that differ in k bits ($1) share at least one
PICTURE_EDGES = """
with bands as (
    select member, hash, band,
        (hash >> (band * (64 // $2))::ubigint) & ((1::ubigint << (64 // $2)::ubigint) - 1) as value
    from hashes, range($2) as bands(band)
)
select distinct x.member as a, y.member as b
from bands x join bands y on x.band = y.band and x.value = y.value and x.member < y.member
where bit_count(xor(x.hash, y.hash)) <= $1
"""
RESULT = """
with near as (
    select c.id, text_copy, cluster, row_number() over (partition by cluster order by c.id) - 1
        as near_copy
    from copies c join near_clusters n on n.member = c.first
), pictures as (
    select id, hash, place from (
        select id, unnest(picture_hashes) as hash, generate_subscripts(picture_hashes, 1) as place
        from documents
    )
), shown as (
    select id, place, cluster, min(id) over (partition by cluster) as first_shown
    from pictures join hashes using (hash) join picture_clusters using (member)
), seen as (
    select id, min(cluster) filter (place = 1) as picture_cluster,
        count(*) filter (first_shown < id) as pictures_seen
    from shown group by id
)
select shard, number, text_copy, cluster as near_cluster, near_copy, picture_cluster,
    pictures_seen
from documents left join near using (id) left join seen using (id) order by shard, number
"""


def compare_documents(tasks: Sequence[Task], path: Path, recipe: CurateRecipe) -> None:
    """Write the columns COMPARED of all documents to the file `path`, unless they are there."""
    import duckdb
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    made_of = [digest(tasks), recipe.near_similarity, recipe.picture_bits, list(COMPARED)]
    state = json.dumps(made_of).encode()
    if path.is_file() and (pq.read_schema(path).metadata or {}).get(STATE) == state:
        return
    # what does not fit into memory goes there, not beside what the user does
    with duckdb.connect(config={"temp_directory": str(path.parent / "spill")}) as base:
        base.register("annotations", ds.dataset([str(task.path) for task in tasks]))
        base.execute(DOCUMENTS)
        base.execute(TEXT_COPIES)
        base.execute(HASHES)
        edges = base.execute(NEAR_EDGES, [recipe.near_similarity]).fetchnumpy()
        base.register("near_clusters", _clusters(edges, _count(base, "documents")))
        edges = picture_edges(base, recipe.picture_bits)
        base.register("picture_clusters", _clusters(edges, _count(base, "hashes")))
        table = base.sql(RESULT).to_arrow_table()
    buffer = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({STATE: state}), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue().to_pybytes())


def picture_edges(base: Any, bits: int) -> Mapping[str, Any]:
    """Pairs a < b of the table `hashes` that differ in at most so many bits."""
    return base.execute(PICTURE_EDGES, [bits, max(2, bits + 1)]).fetchnumpy()


def _count(base: Any, table: str) -> int:
    return base.table(table).shape[0]


def _clusters(edges: Mapping[str, Any], count: int) -> Any:
    """Each of `count` members with the smallest of its cluster, as a pyarrow table."""
    import pyarrow as pa
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = (np.asarray(edges["a"], np.int64), np.asarray(edges["b"], np.int64))
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return pa.table({"member": np.arange(count), "cluster": first[inverse]})
