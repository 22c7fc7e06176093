"""Which rows tie under an ORDER BY, and what a LIMIT makes of them."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing

import pytest

from querl.sql.parse import parse_or_none
from querl.sql.ties import TieCheck, read_tie_check
from querl.sql.tolerance import tied_runs
from querl.types import SqlValue


@pytest.mark.parametrize(
    ("keys", "lengths"),
    [
        ([], []),
        ([1, 1, 2], [2, 1]),
        (["ada", "Ada", "ADA ", "Bob"], [3, 1]),
        ([0.6, 0.6000000000000001, 0.7], [2, 1]),
        ([1, 1.0, 2**60, 2**60 + 1], [2, 1, 1]),
        ([1, 1.0000000000000002], [2]),
        ([2459000.5, 2459000.500012], [1, 1]),  # a second between two julian days
        ([None, None, 0], [2, 1]),
        ([b"a", b"A"], [1, 1]),
        ([math.inf, math.inf], [2]),
        (["1", 1], [1, 1]),
    ],
)
def test_neighbours_tie_where_no_one_can_tell_them_apart(
    keys: list[SqlValue], lengths: list[int]
) -> None:
    assert tied_runs((key,) for key in keys) == lengths


def test_every_key_of_a_row_counts() -> None:
    assert tied_runs([("a", 1), ("A", 1), ("A", 2)]) == [2, 1]


def check(sql: str) -> TieCheck:
    tree = parse_or_none(sql, "sqlite")
    found = read_tie_check(tree) if tree is not None else None
    assert found is not None
    return found


@pytest.mark.parametrize("second", ["ada", "Ada "])
def test_a_limit_between_texts_that_may_tie_leaves_a_choice(second: str) -> None:
    by_name = check("SELECT id FROM t ORDER BY name LIMIT 1")
    assert by_name.cuts_a_tie([(1, "Ada"), (2, second)])
    assert not by_name.is_unique([(1, "Ada"), (2, second)])
    assert not by_name.cuts_a_tie([(1, "Ada"), (2, "Bob")])
    assert by_name.is_unique([(1, "Ada"), (2, "Bob")])


def test_a_limit_between_sums_an_ulp_apart_leaves_a_choice() -> None:
    by_sum = check("SELECT id FROM t GROUP BY id ORDER BY sum(x) LIMIT 1")
    assert by_sum.cuts_a_tie([(1, 0.6), (2, 0.6000000000000001)])
    assert not by_sum.is_unique([(1, 0.6), (2, 0.6000000000000001)])


def test_a_limit_that_keeps_or_drops_a_whole_tie_leaves_none() -> None:
    two = check("SELECT id FROM t ORDER BY name LIMIT 2")
    assert not two.cuts_a_tie([(1, "Ada"), (2, "ada"), (3, "Bob")])
    assert check("SELECT id FROM t ORDER BY name LIMIT 2 OFFSET 1").cuts_a_tie(
        [(1, "Ada"), (2, "ada"), (3, "Bob")]
    )


def test_a_limit_of_zero_keeps_no_row_and_so_leaves_no_choice() -> None:
    tie = [(1, "Ada"), (2, "Ada")]
    assert check("SELECT id FROM t ORDER BY name LIMIT 0").is_unique(tie)
    assert not check("SELECT id FROM t ORDER BY name").is_unique(tie)


@pytest.mark.parametrize(
    ("selected", "key"),
    [
        ("id, name", "name"),
        ("id, name AS called", "called"),
        ("id, name", "2"),
        ("id, name", "lower(name)"),
        ("id AS name, name AS id", "t.name"),  # the column, though an alias has its name
        ("id AS x, name AS id", "id"),  # the alias, though a column has its name
    ],
)
def test_the_check_gives_each_row_with_what_it_is_sorted_by(selected: str, key: str) -> None:
    found = check(f"SELECT {selected} FROM t ORDER BY {key} LIMIT 1 OFFSET 1")
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(
            "CREATE TABLE t (id INT, name TEXT); INSERT INTO t VALUES (1, 'b'), (2, 'c'), (3, 'a');"
        )
        rows = connection.execute(found.sql).fetchall()
    assert rows == [(3, "a", "a"), (1, "b", "b"), (2, "c", "c")]
    assert (found.num_keys, found.start, found.stop) == (1, 1, 2)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM t",
        "SELECT * FROM t ORDER BY 1 LIMIT 1",  # the text does not say which column is the first
        "SELECT id, name FROM t ORDER BY 'name' LIMIT 1",
        "SELECT id FROM t ORDER BY id LIMIT 1 + 1",
        "SELECT id FROM t ORDER BY id LIMIT 1 OFFSET 1 + 1",
    ],
)
def test_what_the_text_does_not_tell_is_not_checked(sql: str) -> None:
    tree = parse_or_none(sql, "sqlite")
    assert tree is not None
    assert read_tie_check(tree) is None
