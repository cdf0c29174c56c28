"""The columns of a document that filters speak of: what annotation and comparison find out.

A column that does not apply (the blur of a document without pictures) is NULL, for which a
comparison is not true: such a document passes.
"""

from typing import Any

Columns = dict[str, tuple[str, str]]  # name -> (type of DuckDB, meaning)

ANNOTATED: Columns = {
    "shard": ("VARCHAR", "path of its shard"),
    "number": ("BIGINT", "its place among what was read of the shard, from 0"),
    "offset": ("BIGINT", "byte of the shard at which it begins"),
    "key": ("VARCHAR", "its name"),
    "base": ("VARCHAR", "key of the idea it shows; decides what is held out"),
    "source": ("VARCHAR", "where it says it comes from"),
    "heldout": ("BOOLEAN", "whether its base key is kept from training"),
    "problem": ("VARCHAR", "why it cannot be used; NULL where it can"),
    "excerpt": ("VARCHAR", "how its text begins"),
    "texts": ("INTEGER", "number of text parts"),
    "pictures": ("INTEGER", "number of pictures and clips; a clip is seen as its middle frame"),
    "sounds": ("INTEGER", "number of sounds"),
    "text_hash": ("VARCHAR", "hash of the words: letter case, punctuation, spaces do not matter"),
    "text_minhash": ("UINTEGER[]", "MinHash of its 5-word runs"),
    "text_chars": ("INTEGER", "characters of its text"),
    "text_words": ("INTEGER", "words of its text; a CJK character is a word"),
    "language": ("VARCHAR", "most likely language (ISO 639)"),
    "language_score": ("DOUBLE", "probability of that language"),
    "word_chars": ("DOUBLE", "mean characters of a word"),
    "stop_words": ("INTEGER", "how many of the, be, to, of, and, that, have, with it holds"),
    "symbols": ("DOUBLE", "# and ellipses, a word"),
    "alphabetic": ("DOUBLE", "share of words with a letter"),
    "bullets": ("DOUBLE", "share of lines that begin with a bullet"),
    "cut_lines": ("DOUBLE", "share of lines that end with an ellipsis"),
    "ended_lines": ("DOUBLE", "share of lines that end with punctuation"),
    "repeated_lines": ("DOUBLE", "share of lines that occurred before"),
    "top_2gram": ("DOUBLE", "share of characters in the most frequent run of 2 words"),
    "top_3gram": ("DOUBLE", "the same of 3 words"),
    "top_4gram": ("DOUBLE", "the same of 4 words"),
    "repeated_5grams": ("DOUBLE", "share of characters in runs of 5 words that occur again"),
    "repeated_10grams": ("DOUBLE", "the same of 10 words"),
    "evaluation": ("VARCHAR", "the evaluation set that it overlaps most"),
    "evaluation_share": ("DOUBLE", "share of its 13-word runs that are in that set"),
    "picture_side": ("INTEGER", "pixels of the shortest side of its pictures"),
    "picture_aspect": ("DOUBLE", "longer side by shorter side, the largest of its pictures"),
    "picture_blur": ("DOUBLE", "variance of the Laplacian, the smallest: low is blurred"),
    "picture_hashes": ("UBIGINT[]", "perceptual hash of each picture, which sees no colours"),
    "sound_seconds": ("DOUBLE", "duration of its sounds"),
    "voice": ("DOUBLE", "share of its sounds in which someone speaks"),
    "clipped": ("DOUBLE", "share of samples at full scale"),
    "chars_per_second": ("DOUBLE", "characters of its text by seconds of its sounds"),
}
COMPARED: Columns = {
    "text_copy": ("BIGINT", "how many documents with the same text come before it"),
    "near_cluster": ("BIGINT", "number of the cluster of its near-duplicates"),
    "near_copy": ("BIGINT", "how many of its near-duplicates come before it"),
    "picture_cluster": ("BIGINT", "number of the cluster of its first picture"),
    "pictures_seen": ("BIGINT", "how many of its pictures documents before it show"),
}
DRAWN: Columns = {"draw": ("DOUBLE", "a number from 0 to 1 by the seed and its key")}
COLUMNS = ANNOTATED | COMPARED | DRAWN
PLACE = {"shard", "number"}


def arrow_schema(columns: Columns) -> Any:
    """The columns as a pyarrow schema."""
    import pyarrow as pa

    types = {
        "VARCHAR": pa.string(),
        "BOOLEAN": pa.bool_(),
        "INTEGER": pa.int32(),
        "BIGINT": pa.int64(),
        "DOUBLE": pa.float64(),
        "UINTEGER[]": pa.list_(pa.uint32()),
        "UBIGINT[]": pa.list_(pa.uint64()),
    }
    return pa.schema([(name, types[kind]) for name, (kind, _) in columns.items()])
