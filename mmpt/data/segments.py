"""The segments of many documents of token shards at once, without an object for each.

Legend: D documents, T segments of all of them, S token shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmpt.data.tokens import SEGMENT_COLUMNS, TokenShard
from mmpt.flat import offsets
from mmpt.vocab import Modality

ROW_BYTES = 4 * len(SEGMENT_COLUMNS)


@dataclass(frozen=True)
class Segments:
    """Segments in file order, document after document.

    Per document (D,): num, how many segments it has; free, whether they may be permuted; shard, in
    which it is; files, the memory of that. Per segment (T,): document, 0 to D - 1; modality; role,
    1 + its place in `ROLES`, 0 outside of conversations; grid, (T, 3), frames, height and width;
    first and last, the bytes of the file that its codes are; width, bytes of a code.
    """

    num: np.ndarray
    free: np.ndarray
    shard: np.ndarray
    files: list[memoryview]
    document: np.ndarray
    modality: np.ndarray
    role: np.ndarray
    grid: np.ndarray
    first: np.ndarray
    last: np.ndarray
    width: np.ndarray

    def codes(self, chosen: np.ndarray) -> np.ndarray:
        """The codes of these segments of one medium, one after another, as they are stored."""
        places = zip(
            self.document[chosen].tolist(),
            self.first[chosen].tolist(),
            self.last[chosen].tolist(),
            strict=True,
        )
        parts = [self.files[document][first:last] for document, first, last in places]
        widths = self.width[chosen]
        if (widths == widths[0]).all():
            return np.frombuffer(b"".join(parts), f"<u{widths[0]}")
        # shards that knew codecs of different sizes
        typed = zip(parts, widths.tolist(), strict=True)
        return np.concatenate([np.frombuffer(part, f"<u{width}") for part, width in typed])


class SegmentIndex:
    """Finds the segments of documents by their number over all shards.

    A block is checked when it is first used, and from then on 9 bytes of each of its documents are
    kept in memory; codes and tables stay in the mapped files.
    """

    def __init__(self, shards: Sequence[TokenShard]) -> None:
        self._files = [shard.memory for shard in shards]
        self._blocks = [block for shard in shards for block in shard.blocks]
        self._starts = offsets([len(block) for block in self._blocks])
        self._shard = np.repeat(np.arange(len(shards)), [len(shard.blocks) for shard in shards])
        # zeros take memory only where something is written
        self._rows = np.zeros(len(self) + len(self._blocks), dtype=np.uint32)
        self._free = np.zeros(len(self), dtype=bool)
        shape = len(self._blocks), len(Modality)
        self._begins, self._widths = (
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape, dtype=np.int64),
        )
        self._tables = np.full(len(self._blocks), -1)
        self._roles = np.full(len(self._blocks), -1)  # where those of a block begin, if it has any

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, numbers: np.ndarray) -> Segments:
        """The segments of these documents, int64 (D,). Raises UserError for damaged blocks."""
        block = np.searchsorted(self._starts, numbers, side="right") - 1
        for new in np.unique(block[self._tables[block] < 0]).tolist():
            self._open(new)
        shard = self._shard[block]
        files = [self._files[place] for place in shard.tolist()]
        # every block has one more boundary than documents
        rows = self._rows[numbers + block].astype(np.int64)
        ends = self._rows[numbers + block + 1].astype(np.int64)
        table = self._tables[block]
        places = zip(
            files,
            (table + rows * ROW_BYTES).tolist(),
            (table + ends * ROW_BYTES).tolist(),
            strict=True,
        )
        memory = b"".join([file[first:last] for file, first, last in places])
        columns = np.frombuffer(memory, "<i4").reshape(-1, len(SEGMENT_COLUMNS)).astype(np.int64).T
        _, modality, offset, length, *grid = columns
        document = np.repeat(np.arange(len(numbers)), ends - rows)
        width = self._widths[block[document], modality]
        first = self._begins[block[document], modality] + offset * width
        return Segments(
            num=ends - rows,
            free=self._free[numbers],
            shard=shard,
            files=files,
            document=document,
            modality=modality,
            role=self._find_roles(files, self._roles[block], rows, ends),
            grid=np.stack(grid, axis=1),
            first=first,
            last=first + length * width,
            width=width,
        )

    def _find_roles(
        self, files: list[memoryview], begin: np.ndarray, rows: np.ndarray, ends: np.ndarray
    ) -> np.ndarray:
        if (begin < 0).all():
            return np.zeros((ends - rows).sum(), dtype=np.uint8)
        places = zip(files, begin.tolist(), rows.tolist(), ends.tolist(), strict=True)
        parts = [
            bytes(end - row) if first < 0 else file[first + row : first + end]
            for file, first, row, end in places
        ]
        return np.frombuffer(b"".join(parts), np.uint8)

    def _open(self, number: int) -> None:
        block, start = self._blocks[number], int(self._starts[number])
        rows = block.rows  # checks it
        self._rows[start + number : start + number + len(rows)] = rows
        self._free[start : start + len(block)] = [order == "any" for order in block.meta["orders"]]
        for modality in Modality:
            name = modality.name.lower()
            if name in block.arrays:
                self._begins[number, modality] = block.begin(name)
                self._widths[number, modality] = block.arrays[name].itemsize
        if "roles" in block.arrays:
            self._roles[number] = block.begin("roles")
        self._tables[number] = block.begin("spans")
