"""Schemas as text, and stored values found by the words of a question."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest

from querl.env.schema_text import DescribedSchemas, ShownValues
from querl.sql.database import Column, ForeignKey, Schema, Table
from querl.sql.databases import DatabaseKind
from querl.sql.names import spelling
from querl.sql.schema import (
    SchemaStyle,
    ValueIndex,
    best_tables,
    merge_values,
    quote_name,
    quote_value,
    render_schema,
)
from querl.sql.worker import SqlitePool
from querl.types import Task

ODD_NAMES = Schema(
    tables=(
        Table(
            name="Order Items",
            columns=(Column(name="rank"), Column(name="Id"), Column(name='a`b"c')),
        ),
    )
)
KEYWORDS = """
ABORT ACTION ADD AFTER ALL ALTER ALWAYS ANALYZE AND AS ASC ATTACH AUTOINCREMENT BEFORE BEGIN BETWEEN
BY CASCADE CASE CAST CHECK COLLATE COLUMN COMMIT CONFLICT CONSTRAINT CREATE CROSS CURRENT DATABASE
DEFAULT DEFERRABLE DEFERRED DELETE DESC DETACH DISTINCT DO DROP EACH ELSE END ESCAPE EXCEPT EXCLUDE
EXCLUSIVE EXISTS EXPLAIN FAIL FILTER FIRST FOLLOWING FOR FOREIGN FROM FULL GENERATED GLOB GROUP
GROUPS HAVING IF IGNORE IMMEDIATE IN INDEX INDEXED INITIALLY INNER INSERT INSTEAD INTERSECT INTO IS
ISNULL JOIN KEY LAST LEFT LIKE LIMIT MATCH MATERIALIZED NATURAL NO NOT NOTHING NOTNULL NULL NULLS OF
OFFSET ON OR ORDER OTHERS OUTER OVER PARTITION PLAN PRAGMA PRECEDING PRIMARY QUERY RAISE RANGE
RECURSIVE REFERENCES REGEXP REINDEX RELEASE RENAME REPLACE RESTRICT RETURNING RIGHT ROLLBACK ROW
ROWS SAVEPOINT SELECT SET TABLE TEMP TEMPORARY THEN TIES TO TRANSACTION TRIGGER UNBOUNDED UNION
UNIQUE UPDATE USING VACUUM VALUES VIEW VIRTUAL WHEN WHERE WINDOW WITH WITHOUT
"""
SINGER = Table(
    name="singer",
    columns=(
        Column(name="singer_id", type="INTEGER", is_primary_key=True),
        Column(name="full name", type="VARCHAR(30)"),
        Column(name="land"),
    ),
)
CONCERT = Table(
    name="concert",
    columns=(
        Column(name="concert_id", type="INT", is_primary_key=True),
        Column(name="singer_id", type="INT"),
    ),
    foreign_keys=(
        ForeignKey(columns=("singer_id",), other_table="singer", other_columns=("singer_id",)),
    ),
)
VENUE = Table(name="venue", columns=(Column(name="town", type="TEXT"),))
SCHEMA = Schema(tables=(SINGER, CONCERT, VENUE))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The schema and the values of a real database."""
    path = tmp_path_factory.mktemp("schema") / "odd.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE "sin""ger" ("na me" TEXT, "emoji 😀" TEXT, born INTEGER, photo BLOB);
            INSERT INTO "sin""ger" VALUES ('Ada O''Hara', 'AB-12', 1990, x'00ff'),
              ('Bo', 'New York', 1991, NULL), ('New York City', 'york', NULL, NULL);
            CREATE TABLE orphan (a REFERENCES gone, b INTEGER REFERENCES "sin""ger");
            CREATE TABLE empty (x TEXT);
            CREATE VIEW broken AS SELECT * FROM gone;
            """
        )

    async def look() -> tuple[Schema, ValueIndex]:
        async with SqlitePool(1) as pool:
            schema = await pool.schema(str(path))
            return schema, await ValueIndex.read(pool, str(path), schema)

    return asyncio.run(look())


def test_the_compact_style_is_a_line_a_table_and_a_line_a_key():
    values = {("singer", "land"): ["Chad", "Peru"]}
    assert render_schema(SCHEMA, style=SchemaStyle.COMPACT, values=values) == (
        "singer(singer_id int pk, \"full name\" text, land ['Chad', 'Peru'])\n"
        "concert(concert_id int pk, singer_id int)\n"
        "venue(town text)\n"
        "fk concert.singer_id = singer.singer_id"
    )


def test_the_full_style_is_ddl_that_sqlite_accepts():
    text = render_schema(SCHEMA, style=SchemaStyle.DDL, values={("venue", "town"): ["a", "b--"]})
    assert "  town TEXT -- 'a', 'b--'\n" in text
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(text)
        keys = connection.execute("SELECT * FROM pragma_foreign_key_list('concert')").fetchall()
        assert keys[0][2:5] == ("singer", "singer_id", "singer_id")


@pytest.mark.parametrize("style", SchemaStyle)
def test_a_schema_with_odd_names_and_dangling_keys_is_rendered(read, style):
    schema, index = read
    text = render_schema(schema, style=style, values=merge_values(index, {}))
    assert '"sin""ger"' in text
    assert '"emoji 😀"' in text
    assert "'Ada O''Hara'" in text
    assert "gone" not in text


def test_the_values_that_a_question_mentions_are_found_longest_first(read):
    _, index = read
    name, code = ('sin"ger', "na me"), ('sin"ger', "emoji 😀")
    assert index.match("who comes from New York City?") == {
        name: ["New York City"],
        code: ["New York", "york"],
    }
    assert index.match("who comes from new-york city?", limit=1)[code] == ["New York"]
    assert index.match("What of Ada O'Hara, code ab 12?") == {name: ["Ada O'Hara"], code: ["AB-12"]}
    assert index.match("nothing here") == {}


def test_every_filled_column_has_a_sample_and_matched_values_go_first(read):
    _, index = read
    born = ('sin"ger', "born")
    merged = merge_values(index, {born: [1991]})
    assert merged[born] == [1991]
    assert merged['sin"ger', "photo"] == [b"\x00\xff"]
    assert ("empty", "x") not in merged


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (ShownValues.NONE, set()),
        (ShownValues.MATCHED, {"Rome"}),
        (ShownValues.SAMPLE, {"Rome", "777"}),
    ],
)
def test_a_prompt_shows_the_values_that_its_recipe_asks_for(tmp_path, values, shown):
    path = tmp_path / "cities.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE city (name TEXT); INSERT INTO city VALUES ('Paris'), ('Rome');"
            "CREATE TABLE river (length INTEGER); INSERT INTO river VALUES (777);"
        )
    task = Task(id="t", question="is Rome there?", database=str(path))

    async def describe():
        async with SqlitePool(1) as pool:
            schemas = DescribedSchemas(pool, style=SchemaStyle.COMPACT, values=values)
            return await schemas.describe(task)

    text = asyncio.run(describe())
    assert {value for value in ("Paris", "Rome", "777") if value in text} == shown


def test_a_budget_keeps_the_tables_that_the_question_names_and_their_neighbours():
    def kept(question: str, max_tokens: int) -> list[str]:
        found = best_tables(SCHEMA, question, matched=(), max_tokens=max_tokens, cost=lambda _: 10)
        return [table.name for table in found.tables]

    assert kept("Which town has most venues?", 10) == ["venue"]
    assert kept("How many concerts are there?", 20) == ["singer", "concert"]
    assert kept("How many concerts are there?", 1) == ["concert"]
    assert kept("How many concerts are there?", 0) == ["singer", "concert", "venue"]


def test_a_budget_keeps_the_tables_that_hold_what_the_question_mentions():
    found = best_tables(
        SCHEMA,
        "Who comes from Budapest?",
        matched={("venue", "town"): ["Budapest"]},
        max_tokens=10,
        cost=lambda _: 10,
    )
    assert [table.name for table in found.tables] == ["venue"]


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("plain_1", "plain_1"),
        ("two words", '"two words"'),
        ('a"b', '"a""b"'),
        ("1st", '"1st"'),
        ("Order", '"Order"'),
    ],
)
def test_names_are_quoted_where_sql_needs_it(name, quoted):
    assert quote_name(name) == quoted


def test_no_word_that_stays_bare_is_a_syntax_error():
    with closing(sqlite3.connect(":memory:")) as connection:
        for word in KEYWORDS.split():
            connection.execute(f"CREATE TABLE t ({quote_name(word)} TEXT)")
            connection.execute(f"SELECT {quote_name(word)} FROM t")
            connection.execute("DROP TABLE t")


@pytest.mark.parametrize(
    ("value", "literal"),
    [("it's", "'it''s'"), (None, "NULL"), (2.5, "2.5"), (b"\x01", "x'01'"), ("a\nb", "'a b'")],
)
def test_values_are_shown_as_literals(value, literal):
    assert quote_value(value) == literal


def test_long_values_are_cut():
    assert quote_value("x" * 100) == "'" + "x" * 39 + "…'"


@pytest.mark.parametrize(
    ("kind", "spelt"),
    [
        (DatabaseKind.SQLITE, '"Order Items"(rank, Id, "a`b""c")'),
        (DatabaseKind.DUCKDB, '"Order Items"("rank", Id, "a`b""c")'),
        (DatabaseKind.POSTGRES, '"Order Items"("rank", "Id", "a`b""c")'),
        (DatabaseKind.MYSQL, '`Order Items`(`rank`, Id, `a``b"c`)'),
    ],
)
def test_names_are_spelt_as_each_engine_reads_them(kind, spelt):
    text = render_schema(ODD_NAMES, style=SchemaStyle.COMPACT, values={}, spell=spelling(kind))
    assert text == spelt
