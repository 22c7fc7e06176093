"""The parts that a suite is built from, each on its own."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from querl.sql.parse import parse_or_none
from querl.suite.distil import choose_databases, rank_databases
from querl.suite.golds import neighbours, parse_gold, read_hints
from querl.suite.mutations import gold_mutants
from querl.suite.neighbours import NULL_SHARES, ROWS_A_TABLE, plans, read_subjects
from querl.suite.source import read_source
from querl.suite.trial import MUTANT_STEPS, Runner, Trial, read_gold

TABLE = """
CREATE TABLE t (id INTEGER PRIMARY KEY, kind TEXT, price REAL);
INSERT INTO t VALUES (1, 'it''s', 0.5), (2, 'it''s', 1.5), (3, NULL, 9e999);
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(TABLE)
    return path


def test_a_database_that_kills_what_is_left_goes_before_one_that_kills_more() -> None:
    assert rank_databases([0b1110, 0b1100, 0b0001], range(3), most=3) == [0, 2, 1]
    assert choose_databases([[0b1110, 0b1100, 0b0001]], most=2) == [0, 2]


def test_where_all_is_killed_the_cover_begins_again_with_the_strongest() -> None:
    assert rank_databases([0b1111, 0b0001, 0b0111], range(3), most=3) == [0, 2, 1]
    assert choose_databases([[0b1111, 0b0001, 0b0111]], most=2) == [0, 2]


def test_databases_that_kill_nothing_are_not_kept() -> None:
    assert choose_databases([[0, 0b1, 0, None]], most=4) == [1]


def test_databases_are_chosen_for_all_golds_together() -> None:
    # the third kills two mutants of each gold, the others three of one
    assert choose_databases([[0b111, 0, 0b011], [0, 0b111, 0b110]], most=1) == [2]


@pytest.mark.parametrize(
    ("literal", "around"),
    [
        (3, (3, 2, 4)),
        (2**63 - 1, (2**63 - 1, 2**63 - 2)),  # SQLite stores no larger integer
        (2.5, (2.5, 2.0, 3.0)),
        ("abc", ("abc", "abca", "aabc", "ab")),
        ("%a_c%", ("axc", "a_ca", "aa_c", "a_")),  # the first matches the pattern
        (None, (None,)),
    ],
)
def test_values_around_a_literal_are_itself_one_below_and_one_above(literal, around):
    assert neighbours(literal) == around


def test_a_literal_belongs_to_the_first_table_that_has_the_column(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE shop (id INTEGER PRIMARY KEY, city TEXT)")
        connection.commit()
    source = read_source(database)  # t is table 0, shop table 1
    sql = "SELECT 1 FROM t JOIN shop AS s WHERE city = 'Rome' AND s.id = 7 AND id = 8 AND x = 9"
    tree = parse_gold(sql, source)
    assert tree is not None
    assert set(read_hints(tree, source).literals) == {((1, 1), "Rome"), ((1, 0), 7), ((0, 0), 8)}


def test_a_sample_is_spread_over_all_rows_and_bounded(database: Path) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE many (id INTEGER PRIMARY KEY)")
        connection.executemany("INSERT INTO many VALUES (?)", [(number,) for number in range(1000)])
        connection.commit()
    _, many = read_source(database).tables
    # at most 300 of 1000: every fourth
    assert many.sample == tuple((number,) for number in range(0, 1000, 4))


def test_a_gold_has_at_most_forty_mutants_all_different_and_none_the_gold(database: Path) -> None:
    conditions = " AND ".join(f"price > {number}" for number in range(30))
    sql = f"SELECT DISTINCT kind FROM t WHERE {conditions} ORDER BY kind"
    tree = parse_or_none(sql, "sqlite")
    assert tree is not None
    mutants = gold_mutants(tree, read_source(database), random.Random(0))
    assert len(mutants) == len(set(mutants)) == 40
    assert tree.sql(dialect="sqlite") not in mutants


def test_sixteen_plans_try_every_size_share_of_nulls_and_way_to_sort() -> None:
    made = plans([], 16, random.Random(0))
    tried = {(plan.num_rows, plan.null_share, plan.sorts_apart) for plan in made}
    assert tried == set(product(ROWS_A_TABLE, NULL_SHARES, (True, False)))


def test_every_gold_is_in_focus_equally_often(database: Path) -> None:
    golds = [f"SELECT id FROM t WHERE id < {number}" for number in range(8)]
    subjects = read_subjects(database, read_source(database), golds, seed=0)
    made = plans(subjects, 8, random.Random(0))
    assert [len(plan.focus) for plan in made] == [6] * 8
    seen = [literal for plan in made for hints in plan.focus for _, literal in hints.literals]
    assert {number: seen.count(number) for number in range(8)} == dict.fromkeys(range(8), 6)


def test_what_a_gold_gives_can_be_copied_as_constants_but_for_infinity(database: Path) -> None:
    golds = [
        "SELECT kind, price, NULL, x'00ff' FROM t WHERE id < 3",
        "SELECT price FROM t",
        "SELECT id FROM t WHERE 0",
    ]
    subjects = read_subjects(database, read_source(database), golds, seed=0)
    copies = [[sql for sql in one.mutants if sql.startswith("VALUES")] for one in subjects]
    assert copies == [
        ["VALUES ('it''s', 0.5, NULL, x'00ff'), ('it''s', 1.5, NULL, x'00ff')"],
        [],  # 9e999 has no spelling that Python and SQLite share
        [],
    ]


def test_a_query_that_fails_differs_and_of_a_slow_one_nothing_is_known(database: Path) -> None:
    sql = "SELECT id FROM t"
    tree = parse_or_none(sql, "sqlite")
    assert tree is not None
    gold = read_gold(sql, tree)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT sum(i) FROM n"
    nothing = read_gold("SELECT id FROM t WHERE 0", tree)
    with Runner(sqlite3.connect(database)) as runner:
        answer = runner.run(sql, MUTANT_STEPS)
        assert answer is not None
        for other, expected in (
            ("SELECT id FROM t ORDER BY id DESC", False),
            ("SELECT id FROM t WHERE id < 3", True),
            ("SELECT json('{') FROM t", True),
            (endless, None),
        ):
            assert runner.differs(other, gold, answer, MUTANT_STEPS) is expected, other
        none = runner.run(nothing.sql, MUTANT_STEPS)
        assert none is not None
        # the judge minds the number of columns even where there is no row
        assert runner.differs("SELECT id, kind FROM t WHERE 0", nothing, none, MUTANT_STEPS)
        assert not runner.differs("SELECT kind FROM t WHERE 0", nothing, none, MUTANT_STEPS)


@pytest.mark.parametrize(
    ("sql", "has_one_answer"),
    [
        ("SELECT id, rank() OVER (ORDER BY kind) FROM t", True),  # rows that tie have one rank
        ("SELECT id, row_number() OVER (ORDER BY kind) FROM t", False),
        ("SELECT id FROM t WHERE id IN (SELECT id FROM t ORDER BY id LIMIT 1)", True),
    ],
)
def test_an_order_in_a_window_is_no_order_of_rows(database: Path, sql, has_one_answer):
    tree = parse_or_none(sql, "sqlite")
    assert tree is not None
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(TABLE)
    with Trial(connection, read_source(database)) as trial:
        assert (trial.answer(read_gold(sql, tree)) is not None) == has_one_answer
