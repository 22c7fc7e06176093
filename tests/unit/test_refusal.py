"""What is found in a text before an engine reads it, whichever engine that is."""

from __future__ import annotations

import time

import pytest

from querl.sql.database import Limits
from querl.sql.refusal import complaint, forbidden
from querl.types import Outcome

NAMES = forbidden(words=[r"read_file\w*"], calls=["random", "uuid"], clauses=["using sample"])


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT random()",
        "SELECT RANDOM /* why */ -- not\n ()",
        'SELECT "random" ()',
        "SELECT `random`()",
        "SELECT random\u200b()",
        "SELECT random\ufeff\u3000()",
        "SELECT [']'], [random(), ']']",  # to SQLite, brackets quote a name
    ],
)
def test_a_call_is_found_behind_blanks_comments_and_quotes(sql):
    assert NAMES.found_in(sql).lower() == "random"


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT uuid -- the id\nFROM t",
        "SELECT `uuid` -- (x)\nFROM t",
        "SELECT uuid /* (text) */ FROM t WHERE a = '(b)'",
        "SELECT a FROM t WHERE b = 'random (x)' AND c <> 'it''s random()'",
        'SELECT "random (x)" FROM t',
        "SELECT 'using sample' -- using sample data",
    ],
)
def test_a_name_that_is_not_called_is_not_found(sql):
    assert NAMES.found_in(sql) is None


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT E'\\'', random(), ''",  # PostgreSQL's escapes, and MySQL's
        "SELECT $$'$$, random(), '",  # dollar quotes
        "SELECT 1 /* /* */ ' */, random() --'",  # a comment in a comment
        "SELECT 1 /*! , random() */",  # MySQL runs it
        "SELECT 1 # '\n, random() -- '",  # MySQL's other comment
        "SELECT 1 --'\n, '+random() -- '",  # two signs to MySQL
        "SELECT 1 --\u200b, random()",
        "SELECT 1 -- '\r, random() -- '",  # PostgreSQL ends a comment there
        "SELECT `'`, random(), `'`",  # a quote within a quoted name, or two names
        "SELECT '', random(), '",
    ],
)
def test_no_engine_s_own_quotes_hide_a_call_from_us(sql):
    assert NAMES.found_in(sql) == "random"


def test_words_are_found_in_strings_too():
    assert NAMES.found_in("SELECT run('SELECT read_file(1)')") == "read_file"


def test_the_words_of_a_clause_may_stand_apart():
    assert NAMES.found_in("SELECT a FROM t USING /* a */ -- b\n SAMPLE 1") is not None


@pytest.mark.parametrize("between", ["/**/", "/* /* a */ b */", "-- c\n"])
def test_the_words_of_a_clause_are_found_where_comments_are_not_clear(between):
    assert NAMES.found_in(rf"SELECT '\' AS a, x FROM t USING {between} SAMPLE 3") == "using sample"
    assert NAMES.found_in(rf"SELECT '\' AS a, x FROM t USING {between} EXAMPLE 3") is None


@pytest.mark.parametrize(
    "text",
    ["'" * 99_999, "/*" * 50_000, "'x" * 50_000, "random " * 14_000, "\\" + "using " * 16_000],
)
def test_long_hostile_texts_are_searched_in_linear_time(text):
    started = time.perf_counter()
    NAMES.found_in(text)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("WITH x AS (SELECT 1) DELETE FROM t", "DELETE"),
        ("WITH x AS (SELECT a FROM (VALUES (1))) INSERT INTO t SELECT * FROM x", "INSERT"),
        ("/* SELECT */ with x as (select 1) Update t SET a = (SELECT 2)", "UPDATE"),
        ("PRAGMA x", "PRAGMA"),
    ],
)
def test_a_statement_that_writes_does_not_reach_the_engine_behind_a_with(sql, word):
    found = complaint(sql, Limits(), NAMES)
    assert found is not None
    assert found.outcome is Outcome.REFUSED
    assert found.message.startswith(f"{word} is not allowed")


@pytest.mark.parametrize(
    "sql",
    [
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "WITH x AS (SELECT 'DELETE') VALUES (1)",
        "(SELECT 1)",
        "FROM t SELECT a",
    ],
)
def test_queries_reach_the_engine(sql):
    assert complaint(sql, Limits(), NAMES) is None


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT '\ud800'", "not valid Unicode"),
        ("SELECT '\0'", "null character"),
        ("-- nothing", "no SQL statement"),
        ("hello", "only SELECT queries run"),
    ],
)
def test_what_is_no_statement_is_an_error_and_no_engine_sees_it(sql, words):
    found = complaint(sql, Limits(), NAMES)
    assert found is not None
    assert found.outcome is Outcome.SQL_ERROR
    assert words in found.message


def test_the_length_of_sql_is_counted_in_bytes():
    sql = "SELECT 'é'"  # ten characters, eleven bytes
    assert complaint(sql, Limits(max_sql_bytes=11), NAMES) is None
    found = complaint(sql, Limits(max_sql_bytes=10), NAMES)
    assert found is not None
    assert found.outcome is Outcome.REFUSED
