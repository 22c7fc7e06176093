"""Comparison of results: case tables in SQL for all judges, and the finer points."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pytest

from querl.sql.compare import (
    CompareMode,
    order_matters,
    remove_distinct,
    same_result,
    soft_f1,
    sort_columns,
    ves_reward,
)
from querl.types import Outcome, QueryResult, SqlValue

STRICT, SPIDER = CompareMode.STRICT, CompareMode.SPIDER
Rows = Sequence[tuple[SqlValue, ...]]


@dataclass(frozen=True)
class Case:
    tables: str
    shows: str
    equal_for: set[str]
    gold: str
    predicted: str


def cases(file: Path) -> Iterator[Case]:
    tables, *blocks = file.read_text().strip().split("\n\n")
    for block in blocks:
        shows, equal_for, gold, predicted = block.splitlines()
        assert equal_for.startswith("-- equal for: ")
        judges = set(equal_for.removeprefix("-- equal for: ").split()) - {"none"}
        assert judges <= {mode.value for mode in CompareMode}
        yield Case(tables, shows.removeprefix("-- "), judges, gold, predicted)


CASES = [
    pytest.param(case, id=f"{file.stem}: {case.shows}")
    for file in sorted((Path(__file__).parents[1] / "cases").glob("compare_*.sql"))
    for case in cases(file)
]


def execute(connection: sqlite3.Connection, sql: str) -> QueryResult:
    try:
        cursor = connection.execute(sql)
    except sqlite3.OperationalError as error:
        return QueryResult(outcome=Outcome.SQL_ERROR, message=str(error))
    columns = tuple(column[0] for column in cursor.description)
    return QueryResult(outcome=Outcome.ROWS, columns=columns, rows=tuple(cursor))


def rows(*cells: tuple[SqlValue, ...]) -> QueryResult:
    width = len(cells[0]) if cells else 0
    columns = tuple(f"c{index}" for index in range(width))
    return QueryResult(outcome=Outcome.ROWS, columns=columns, rows=cells)


def same(predicted: Rows, gold: Rows, mode: CompareMode = STRICT, *, ordered: bool = False) -> bool:
    return same_result(rows(*predicted), rows(*gold), mode, order_matters=ordered)


@pytest.mark.parametrize("mode", CompareMode)
@pytest.mark.parametrize("case", CASES)
def test_every_judge_says_what_its_rules_say(case: Case, mode: CompareMode) -> None:
    prepared = remove_distinct if mode is SPIDER else str
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(case.tables)
        gold = execute(connection, prepared(case.gold))
        predicted = execute(connection, prepared(case.predicted))
    is_ordered = order_matters(case.gold, mode)
    keys = sort_columns(case.gold, gold.columns)
    verdict = same_result(predicted, gold, mode, order_matters=is_ordered, sort_columns=keys)
    assert verdict == (mode.value in case.equal_for)


def test_every_gold_of_the_case_tables_runs_unless_its_failure_is_the_case() -> None:
    failing = set()
    for parameters in CASES:
        case = parameters.values[0]
        assert isinstance(case, Case)
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.executescript(case.tables)
            if execute(connection, case.gold).outcome is not Outcome.ROWS:
                failing.add(case.shows)
    assert failing == {"the same failure on both sides"}


@pytest.mark.parametrize("mode", CompareMode)
@pytest.mark.parametrize("outcome", [one for one in Outcome if one is not Outcome.ROWS])
def test_a_failure_equals_nothing(outcome: Outcome, mode: CompareMode) -> None:
    failure, empty = QueryResult(outcome=outcome), rows()
    for pair in ((failure, empty), (empty, failure), (failure, failure)):
        assert not same_result(*pair, mode, order_matters=False)
        assert soft_f1(*pair) == 0.0


def test_closeness_is_no_chain_but_every_pairing_is_found() -> None:
    step = 0.8e-6  # two neighbours agree, the next but one does not
    low, middle, high = 1.0, 1.0 + step, 1.0 + 2 * step
    assert not same([(low,)], [(high,)])
    assert same([(middle,), (high,)], [(low,), (middle,)])
    assert not same([(high,), (high,)], [(low,), (middle,)])
    # whichever row (middle, middle) is given first, only one of its partners leaves one over
    assert same(
        [(middle, middle), (low, low), (low, high)],
        [(middle, high), (middle, low), (middle, middle)],
    )
    # (low, middle) agrees with both, and must leave (middle, low) to the row that has no other
    assert same([(low, middle), (high, low)], [(middle, low), (middle, high)])
    assert not same([(low, middle), (high, low)], [(middle, high), (middle, high)])


def test_a_long_run_of_close_numbers_is_paired_in_sorted_order() -> None:
    chain = [(1.0 + number * 0.6e-6,) for number in range(200)]  # each agrees with its neighbours
    moved = [(number * (1 + 0.3e-6),) for (number,) in chain[::-1]]
    assert same(moved, chain)
    assert not same([(1.001,), *moved[1:]], chain)


def test_integers_are_exact_even_beside_floats() -> None:
    assert same([(5_000_000,), (5_000_001.0,)], [(5_000_000.0,), (5_000_001,)])
    assert not same([(5_000_000,), (0.5,)], [(5_000_001,), (0.5,)])
    assert not same([(10**400,)], [(1.5,)])
    assert not same([(10**400,)], [(10**400 + 1,)])


def test_expected_rows_that_are_none_equal_any_empty_result() -> None:
    nothing = QueryResult(outcome=Outcome.ROWS)
    empty = QueryResult(outcome=Outcome.ROWS, columns=("a", "b"))
    assert same_result(empty, nothing, STRICT, order_matters=False)


def test_strict_permutes_columns_only_when_asked() -> None:
    predicted, gold = rows((0.1 + 0.2, 1), (2.0, 3)), rows((3, 2.0), (1, 0.3))
    assert not same_result(predicted, gold, STRICT, order_matters=False)
    assert same_result(predicted, gold, STRICT, order_matters=False, column_order_free=True)
    assert not same_result(predicted, gold, STRICT, order_matters=True, column_order_free=True)


def test_ties_stay_free_while_columns_are_permuted() -> None:
    predicted, gold = rows((1, "b"), (1, "a"), (2, "c")), rows(("a", 1), ("b", 1), ("c", 2))
    for keys, expected in (((1,), True), ((), False)):
        verdict = same_result(
            predicted,
            gold,
            STRICT,
            order_matters=True,
            column_order_free=True,
            sort_columns=keys,
        )
        assert verdict is expected


def test_sort_keys_are_found_where_they_are_selected() -> None:
    assert sort_columns("SELECT a, b FROM t ORDER BY b DESC, 1", ["a", "b"]) == (1, 0)
    assert sort_columns("SELECT T1.a FROM t AS T1 ORDER BY A", ["a"]) == (0,)
    assert sort_columns("SELECT x.a, y.a FROM t x JOIN t y ORDER BY y.a", ["a", "a"]) == (1,)
    assert sort_columns("SELECT a, count(*) FROM t GROUP BY a ORDER BY COUNT(*)", ["a", "n"]) == (
        1,
    )
    assert sort_columns("(SELECT a FROM t ORDER BY a)", ["a"]) == (0,)
    assert sort_columns("SELECT a, b FROM t ORDER BY a + b", ["a", "b"]) == ()
    assert sort_columns("SELECT a, b FROM t ORDER BY a, c", ["a", "b"]) == ()
    # the key is the other table's, whatever the name of the visible column
    assert sort_columns("SELECT x.* FROM t x JOIN u y ORDER BY y.a", ["a", "b"]) == ()
    # a collation makes more rows tie than the values show
    assert sort_columns("SELECT a FROM t ORDER BY a COLLATE NOCASE", ["a"]) == ()
    assert sort_columns("SELECT a FROM t", ["a"]) == ()


def test_a_gold_that_no_parser_reads_still_has_its_order() -> None:
    unreadable = "SELECT a FROM t WHERE (( ORDER BY a"
    assert not order_matters(unreadable, STRICT)
    assert order_matters("SELECT a a a FROM t ORDER BY a", STRICT)
    assert sort_columns("SELECT a a a FROM t ORDER BY a", ["a"]) == ()


def test_soft_f1_counts_cells_in_common_row_by_row() -> None:
    gold = rows((1, "a"), (2, "b"))
    assert soft_f1(gold, gold) == 1.0
    assert soft_f1(rows(("a", 1), ("b", 2)), gold) == 1.0
    assert soft_f1(rows(), rows()) == 1.0
    assert soft_f1(rows(), gold) == 0.0
    assert soft_f1(gold, rows()) == 0.0
    # one of two rows: precision 1, recall 1/2
    assert soft_f1(rows((1, "a")), gold) == pytest.approx(2 / 3)
    # one of two cells in each row: precision and recall 1/2
    assert soft_f1(rows((1, "x"), (2, "x")), gold) == pytest.approx(1 / 2)
    # a column too many: precision 2/3, recall 1
    assert soft_f1(rows((1, "a", 9), (2, "b", 9)), gold) == pytest.approx(4 / 5)
    # a row twice counts once
    assert soft_f1(rows((1, "a"), (1, "a"), (2, "b")), gold) == 1.0


def test_ves_rewards_speed_in_five_tiers() -> None:
    ratios = [3.0, 2.0, 1.99, 1.0, 0.99, 0.5, 0.49, 0.25, 0.24, 0.0]
    rewards = [1.25, 1.25, 1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.0]
    assert [ves_reward(ratio) for ratio in ratios] == rewards


@pytest.mark.parametrize("mode", [STRICT, SPIDER])
def test_many_alike_columns_do_not_explode(mode: CompareMode) -> None:
    """A ring of 24 columns against two of 12: no order makes them equal, each column fits all."""

    def ring(start: int, size: int) -> Rows:
        return [
            tuple(int(column in (start + i, start + (i + 1) % size)) for column in range(24))
            for i in range(size)
        ]

    two = rows(*ring(0, 12), *ring(12, 12))
    started = perf_counter()
    for gold, expected in ((rows(*ring(0, 24)), False), (rows(*two.rows[::-1]), True)):
        verdict = same_result(two, gold, mode, order_matters=False, column_order_free=True)
        assert verdict is expected
    assert perf_counter() - started < 10


def test_a_hundred_thousand_float_rows_compare_fast() -> None:
    gold = [(n, f"name {n % 977}", n * 0.37) for n in range(100_000)]
    predicted = [(n, name, price * (1 + 1e-12)) for n, name, price in reversed(gold)]
    started = perf_counter()
    assert same(predicted, gold)
    assert perf_counter() - started < 5  # 0.7 s on one core; the rest is room for a busy one


def test_spider_takes_more_golds_as_ordered_than_are(shared_data: Path) -> None:
    golds = (shared_data / "spider" / "dev_gold.sql").read_text().splitlines()
    queries = [line.split("\t")[0] for line in golds]
    ordered = [sql for sql in queries if order_matters(sql, STRICT)]
    read_as_ordered = [sql for sql in queries if order_matters(sql, SPIDER)]
    assert set(ordered) < set(read_as_ordered)
    assert all(re.search(r"\border by\b", sql, re.IGNORECASE) for sql in ordered)
