"""What `mmpt data curate` does, as a TOML recipe."""

from dataclasses import dataclass, field

from mmpt.config import UserError

# 14 bands of 8 hashes find pairs of Jaccard similarity 0.72 as often as not, and 0.8 to 92%
# (the banding of FineWeb, arXiv 2406.17557)
BANDS, ROWS = 14, 8
NUM_HASHES = BANDS * ROWS
LOWEST_SIMILARITY = 0.7
MAX_BITS = 7


@dataclass(frozen=True, kw_only=True)
class CurateRecipe:
    """Which shards, compared with what, and which documents are filtered.

    filters: name -> an SQL expression over the columns of a document (`mmpt.data.curate.columns`);
    a document for which it is true is left out. The first that is true, in the order of the recipe,
    is why. evaluations: name -> text files and shards whose text must not be trained on.
    near_similarity: from which estimated Jaccard similarity of 5-word runs texts are one.
    picture_bits: in how many of the 64 bits of their perceptual hashes pictures that are one may
    differ. seed: of the column `draw`.
    """

    shards: tuple[str, ...]
    filters: dict[str, str] = field(default_factory=dict)
    evaluations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    near_similarity: float = 0.8
    picture_bits: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not LOWEST_SIMILARITY <= self.near_similarity <= 1:
            raise UserError(
                f"near_similarity = {self.near_similarity}; use {LOWEST_SIMILARITY} to 1"
            )
        if not 0 <= self.picture_bits <= MAX_BITS:
            raise UserError(f"picture_bits = {self.picture_bits}; use 0 to {MAX_BITS}")
