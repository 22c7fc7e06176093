"""The samples of a group begin alike: what they are shown is made once."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from templates import FAMILIES

from querl.env.schema_text import DescribedSchemas, ShownValues
from querl.rollout.history import Conversation
from querl.sql.schema import SchemaStyle
from querl.sql.worker import SqlitePool
from querl.types import Message, Task


def messages(question: str) -> tuple[Message, ...]:
    return ({"role": "system", "content": "SQL."}, {"role": "user", "content": question})


def test_the_samples_of_a_group_share_one_prompt_and_groups_do_not() -> None:
    chat = FAMILIES["qwen2.5"].chat()
    history = Conversation(chat)
    first = history.start(messages("how many?"))
    assert history.start(messages("how many?")) is first
    assert history.start(messages("which?")) != first
    assert first == chat.encode(chat.render(messages("how many?"), add_generation_prompt=True))


def test_a_schema_is_rendered_once_a_question_with_the_values_that_it_mentions(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cities.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE city (name TEXT)")
        connection.execute("CREATE TABLE river (length REAL)")
        connection.executemany("INSERT INTO city VALUES (?)", [("Paris",), ("Rome",)])
        connection.commit()
    counted: list[str] = []

    def count_tokens(text: str) -> int:
        counted.append(text)
        return len(text)

    async def describe() -> list[str]:
        async with SqlitePool(1) as pool:
            schemas = DescribedSchemas(
                pool,
                style=SchemaStyle.DDL,
                values=ShownValues.MATCHED,
                max_tokens=10_000,
                count_tokens=count_tokens,
            )
            paris = Task(id="t", question="is Paris there?", database=str(path))
            alike = await asyncio.gather(*(schemas.describe(paris) for _ in range(8)))
            return [*alike, await schemas.describe(replace(paris, question="is Rome there?"))]

    *paris, rome = asyncio.run(describe())
    assert len(set(paris)) == 1
    assert "Paris" in paris[0]
    assert "Rome" not in paris[0]
    assert "Rome" in rome
    assert len(counted) == 3  # two tables; of the second question only the one that has changed
