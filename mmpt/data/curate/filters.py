"""Thresholds: SQL expressions of a recipe over the columns of each document.

DuckDB evaluates them over the parquet files. It may read nothing else: no files, no network, no
variables of this program; and an expression is one expression, not a statement.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data.curate.annotate import Task
from mmpt.data.curate.columns import ANNOTATED, COLUMNS, COMPARED, PLACE, arrow_schema

LOCK = (
    "set enable_external_access = false",
    "set python_enable_replacements = false",
    "set autoinstall_known_extensions = false",
    "set autoload_known_extensions = false",
    "set lock_configuration = true",
)
# the draw is that of a key, so that it does not move with the other documents
DOCUMENTS = """
select *, md5_number_lower('{seed} ' || key) / 18446744073709551616.0 as draw
from annotations left join compared using (shard, number)
"""
REPORTED = ("shard", "number", "offset", "key", "problem", "excerpt")
ROWS = 10_000  # that are judged at once


def check_filters(filters: Mapping[str, str]) -> None:
    """Raises UserError for an expression that is none, or that speaks of unknown columns."""
    empty = arrow_schema(ANNOTATED).empty_table()
    place = {name: column for name, column in ANNOTATED.items() if name in PLACE}
    compared = arrow_schema(place | COMPARED).empty_table()
    with _documents(empty, compared, seed=0) as documents:
        for name in filters:
            _judged(documents, {name: filters[name]})


def judge(
    tasks: Sequence[Task], compared: Path, filters: Mapping[str, str], *, seed: int
) -> Iterator[dict[str, Any]]:
    """Every row of the annotations in the order of shards: its place, and what each filter says.

    The columns REPORTED are those of the annotations; "why" lists the names of
    the filters that are true, in their order.
    """
    import duckdb
    import pyarrow.dataset as ds

    annotations = ds.dataset([str(task.path) for task in tasks])
    with _documents(annotations, ds.dataset(str(compared)), seed=seed) as documents:
        try:
            for batch in _judged(documents, filters).to_arrow_reader(ROWS):
                for row in batch.to_pylist():
                    yield row | {"why": [name for name in filters if row.pop(f"filter {name}")]}
        except duckdb.Error as error:  # an expression that fails on a value
            raise UserError(f"a filter cannot be evaluated: {_first_line(error)}") from None


@contextmanager
def _documents(annotations: Any, compared: Any, *, seed: int) -> Iterator[Any]:
    """The relation that expressions see, in a database that reaches nothing else."""
    import duckdb

    with duckdb.connect() as base:
        base.register("annotations", annotations)
        base.register("compared", compared)
        for setting in LOCK:
            base.execute(setting)
        yield base.sql(DOCUMENTS.format(seed=seed))


def _judged(documents: Any, filters: Mapping[str, str]) -> Any:
    import duckdb

    columns = [duckdb.ColumnExpression(name) for name in REPORTED]
    for name, expression in filters.items():
        try:
            judged = duckdb.SQLExpression(expression)
            [kind] = documents.select(judged).types
            documents.select(*columns, judged.alias(name))
        except duckdb.Error as error:
            why = f"{_first_line(error)}{_nearest_column(str(error))}"
            raise UserError(f"filters.{name} = {expression!r}: {why}") from None
        if str(kind) != "BOOLEAN":
            raise UserError(
                f"filters.{name} = {expression!r} is of type {kind}; write a condition, such as "
                "text_chars < 20"
            )
        columns.append(judged.alias(f"filter {name}"))
    return documents.select(*columns).order("shard, number")


def _nearest_column(message: str) -> str:
    unknown = re.search(r'Referenced column "(.+?)"', message)
    if unknown is None:
        return ""
    near = difflib.get_close_matches(unknown[1], COLUMNS, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" Columns are {', '.join(COLUMNS)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
