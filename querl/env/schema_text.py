"""The schema section of a prompt: read once a database, matched and rendered once a question."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

from querl.sql.databases import database_kind
from querl.sql.descriptions import read_descriptions
from querl.sql.names import spelling
from querl.sql.schema import (
    SchemaStyle,
    ValueIndex,
    best_tables,
    merge_values,
    render_schema,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from querl.sql.database import Databases, Schema, Table
    from querl.sql.descriptions import Descriptions
    from querl.sql.schema import ColumnValues
    from querl.types import Task


class ShownValues(StrEnum):
    """Which stored values a prompt shows."""

    NONE = "none"
    MATCHED = "matched"  # those that the question mentions
    SAMPLE = "sample"  # those, and one of every other column


_KEPT_TEXTS = 256  # groups whose samples may begin side by side
_KEPT_COUNTS = 4096  # tables: the 166 databases of Spider have 874

T = TypeVar("T")


class OncePerDatabase(Generic[T]):
    """What ``read`` finds out of a database, once, however many episodes ask at the same time."""

    def __init__(self, read: Callable[[str], Coroutine[None, None, T]]) -> None:
        self._read = read
        self._known: dict[str, asyncio.Task[T]] = {}

    async def of(self, database: str) -> T:
        """What is known of it. Raises what reading it raised."""
        reading = self._known.get(database)
        if reading is None:
            reading = asyncio.ensure_future(self._read(database))
            self._known[database] = reading
        # shielded: an episode that is cancelled must not spoil the look for the others
        return await asyncio.shield(reading)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    schema: Schema
    index: ValueIndex | None
    descriptions: Descriptions


class DescribedSchemas:
    """Implements ``querl.env.prompts.SchemaText``; each database is looked at once.

    As DDL, columns have the descriptions that BIRD keeps beside its databases.
    ``max_tokens`` (0: no limit) keeps the tables that suit the question best, as counted by
    ``count_tokens``.
    """

    def __init__(
        self,
        databases: Databases,
        *,
        style: SchemaStyle,
        values: ShownValues,
        max_tokens: int = 0,
        count_tokens: Callable[[str], int] = len,
    ) -> None:
        self._databases = databases
        self._style = style
        self._values = values
        self._max_tokens = max_tokens
        # most tables read the same in every question of their database
        self._count_tokens = lru_cache(_KEPT_COUNTS)(count_tokens)
        self._known = OncePerDatabase(self._read)
        self._text = lru_cache(_KEPT_TEXTS)(self._describe)

    async def describe(self, task: Task) -> str:
        """The schema of a task's database as text. Raises DataError when it is missing."""
        known = await self._known.of(task.database)
        return self._text(task.database, known, f"{task.question} {task.evidence}")

    def _describe(self, database: str, known: _Known, asked: str) -> str:
        matched: ColumnValues = {} if known.index is None else known.index.match(asked)
        values = matched
        if known.index is not None and self._values is ShownValues.SAMPLE:
            values = merge_values(known.index, matched)

        spell = spelling(database_kind(database))

        def render(schema: Schema) -> str:
            return render_schema(
                schema,
                style=self._style,
                values=values,
                descriptions=known.descriptions,
                spell=spell,
            )

        def cost(table: Table) -> int:
            return self._count_tokens(render(type(known.schema)(tables=(table,))))

        return render(
            best_tables(
                known.schema,
                asked,
                matched=matched.keys(),
                max_tokens=self._max_tokens,
                cost=cost,
            )
        )

    async def _read(self, database: str) -> _Known:
        schema = await self._databases.schema(database)
        descriptions = read_descriptions(database) if self._style is SchemaStyle.DDL else {}
        if self._values is ShownValues.NONE:
            return _Known(schema, None, descriptions)
        index = await ValueIndex.read(self._databases, database, schema)
        return _Known(schema, index, descriptions)
