"""The cache of gold results: right, shared, bounded, and never in the way."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import querl
from querl.errors import DataError
from querl.sql.database import Limits
from querl.sql.gold_cache import CachedGolds, GoldCache, RecentResults, default_cache_path
from querl.sql.judge import Judge
from querl.sql.worker import SqlitePool
from querl.types import Outcome, QueryResult, Task

GOLD = "SELECT name, fee, photo, NULL FROM singer ORDER BY name"


@pytest.fixture
def database(tmp_path) -> str:
    path = tmp_path / "music.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE singer (name TEXT, fee REAL, photo BLOB);"
            "INSERT INTO singer VALUES ('Ada', 1.5, x'00ff'), ('Bo', 2, NULL);"
        )
    return str(path)


@pytest.fixture
def cache(tmp_path):
    with GoldCache(tmp_path / "new" / "cache" / "golds.sqlite") as cache:
        yield cache


class CountingPool(SqlitePool):
    """Counts what reaches the database."""

    num_calls = 0

    async def execute(self, *arguments, **named) -> QueryResult:
        self.num_calls += 1
        return await super().execute(*arguments, **named)


def num_executed(cache: GoldCache, *steps: tuple[str, str, Limits] | Callable[[], object]) -> int:
    """How many of the queries were executed and not found; functions run between them."""

    async def run() -> int:
        async with CountingPool(1) as pool:
            golds = CachedGolds(pool, cache, Limits())
            for step in steps:
                if callable(step):
                    step()
                else:
                    assert (await golds.execute(*step)).outcome is Outcome.ROWS
            return pool.num_calls

    return asyncio.run(run())


def test_a_result_from_the_cache_is_the_one_that_was_put_there(cache, database):
    async def run() -> list[QueryResult]:
        async with SqlitePool(1) as pool:
            golds = CachedGolds(pool, cache, Limits())
            return [await golds.execute(database, GOLD) for _ in range(2)]

    executed, cached = asyncio.run(run())
    assert executed == cached
    assert cached.rows == (("Ada", 1.5, b"\x00\xff", None), ("Bo", 2.0, None, None))
    assert isinstance(cached.rows[1][1], float)


def test_a_gold_query_is_executed_once_for_all_runs(cache, database):
    assert num_executed(cache, (database, GOLD, Limits()), (database, GOLD, Limits())) == 1
    assert num_executed(cache, (database, GOLD, Limits())) == 0


def test_other_sql_and_other_limits_are_other_results(cache, database):
    first, second, third = (
        (database, GOLD, Limits()),
        (database, GOLD + " ", Limits()),
        (database, GOLD, Limits(max_rows=50)),
    )
    assert num_executed(cache, first, second, third) == 3


def test_a_copy_elsewhere_has_the_same_results(cache, database, tmp_path):
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(Path(database).read_bytes())
    assert num_executed(cache, (database, GOLD, Limits()), (str(copy), GOLD, Limits())) == 1


def test_a_database_that_was_written_is_asked_again(cache, database):
    def write() -> None:
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("UPDATE singer SET fee = 3 WHERE name = 'Ada'")

    gold = (database, GOLD, Limits())
    assert num_executed(cache, gold, write, gold, gold) == 2


def test_a_database_with_a_log_beside_it_is_not_cached(cache, database):
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("UPDATE singer SET fee = 9")
        gold = (database, GOLD, Limits())
        assert num_executed(cache, gold, gold) == 2


def test_failures_are_not_kept(cache, database):
    async def run() -> int:
        async with CountingPool(1) as pool:
            golds = CachedGolds(pool, cache, Limits())
            for _ in range(2):
                assert (await golds.execute(database, "SELECT x")).outcome is Outcome.SQL_ERROR
            return pool.num_calls

    assert asyncio.run(run()) == 2


def test_a_missing_database_is_a_data_error_that_names_it(cache, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        num_executed(cache, (str(tmp_path / "nowhere.sqlite"), GOLD, Limits()))


@pytest.mark.parametrize("damage", [b"no database at all", b"", b"SQLite format 3\x00" + b"x" * 99])
def test_a_damaged_cache_is_made_anew(tmp_path, database, damage):
    path = tmp_path / "golds.sqlite"
    path.write_bytes(damage)
    gold = (database, GOLD, Limits())
    with GoldCache(path) as cache:
        assert num_executed(cache, gold, gold) == 1


def test_a_damaged_result_is_executed_again_and_replaced(tmp_path, database):
    path = tmp_path / "golds.sqlite"
    gold = (database, GOLD, Limits())
    with GoldCache(path) as cache:
        num_executed(cache, gold)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE results SET body = substr(body, 1, length(body) - 3)")
        assert num_executed(cache, gold, gold) == 1


def test_a_cache_that_cannot_be_written_is_passed_by(tmp_path, database):
    (tmp_path / "file").write_text("not a folder")
    gold = (database, GOLD, Limits())
    with GoldCache(tmp_path / "file" / "golds.sqlite") as cache:
        assert num_executed(cache, gold, gold) == 2


def test_a_cache_that_was_locked_at_first_is_used_later(tmp_path, database):
    path = tmp_path / "golds.sqlite"
    gold = (database, GOLD, Limits())
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, GoldCache(path) as cache:
        writer.execute("BEGIN EXCLUSIVE")
        assert num_executed(cache, gold) == 1
        writer.execute("ROLLBACK")
        assert num_executed(cache, gold, gold) == 1


def test_a_misuse_leaves_the_cache_as_it_is(cache):
    cache.put("key", QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=((1,),)))
    errors = []

    def misuse() -> None:
        try:
            cache.get("key")
        except sqlite3.ProgrammingError as error:
            errors.append(error)

    thread = threading.Thread(target=misuse)  # SQLite's connections belong to one thread
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert cache.get("key") is not None


def test_a_path_that_is_no_utf8_is_cached_as_any_other(cache, database, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.sqlite")
    os.rename(database, path)
    os.utime(path, (1, 1))  # written long ago
    gold = (path, GOLD, Limits())
    assert num_executed(cache, gold, gold) == 1


def test_the_oldest_results_go_when_the_cache_is_full(tmp_path):
    path = tmp_path / "golds.sqlite"
    noise = Random(0)  # does not compress
    results = [
        QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=((noise.randbytes(600),),))
        for _ in range(200)
    ]
    with GoldCache(path, max_bytes=40_000) as cache:
        for number, result in enumerate(results):
            cache.put(f"key {number}", result)
        kept = [number for number in range(200) if cache.get(f"key {number}") is not None]
    assert path.stat().st_size <= 60_000
    assert 10 < len(kept) < 60
    assert kept == list(range(kept[0], 200))


def test_a_cache_that_has_no_room_for_its_own_tables_keeps_nothing(tmp_path):
    result = QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=((1,),))
    with GoldCache(tmp_path / "golds.sqlite", max_bytes=1_000) as cache:
        cache.put("key", result)
        assert cache.get("key") is None


def test_several_processes_write_one_cache(tmp_path):
    path = tmp_path / "golds.sqlite"
    code = (
        "import sys; from pathlib import Path; from querl.sql.gold_cache import GoldCache\n"
        "from querl.types import Outcome, QueryResult\n"
        "with GoldCache(Path(sys.argv[1])) as cache:\n"
        "    for i in range(200):\n"
        "        rows = ((int(sys.argv[2]), i),)\n"
        "        result = QueryResult(outcome=Outcome.ROWS, columns=('a', 'b'), rows=rows)\n"
        "        cache.put(f'{sys.argv[2]} {i}', result)\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(number)],
            cwd=Path(querl.__file__).parents[1],
        )
        for number in range(3)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    with GoldCache(path) as cache:
        found = [(n, i, cache.get(f"{n} {i}")) for n in range(3) for i in range(200)]
    present = [(n, i, result) for n, i, result in found if result is not None]
    assert all(result.rows == ((n, i),) for n, i, result in present)
    assert len(present) > 500  # a locked moment may cost a result, never a wrong one


VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()


@given(rows=st.lists(st.tuples(VALUES | st.binary(), VALUES | st.binary()), max_size=5))
def test_every_value_comes_back_as_it_went_in(tmp_path_factory, rows):
    result = QueryResult(outcome=Outcome.ROWS, columns=("a", "a"), rows=tuple(rows), steps=7)
    with GoldCache(tmp_path_factory.mktemp("values") / "golds.sqlite") as cache:
        cache.put("key", result)
        found = cache.get("key")
    assert repr(found) == repr(result)


def test_the_cache_holds_json_and_no_pickles(cache, database, tmp_path):
    num_executed(cache, (database, GOLD, Limits()))
    with closing(sqlite3.connect(tmp_path / "new" / "cache" / "golds.sqlite")) as connection:
        ((body,),) = connection.execute("SELECT body FROM results").fetchall()
    assert json.loads(zlib.decompress(body))[0] == ["name", "fee", "photo", "NULL"]


def test_the_results_in_memory_are_bounded_by_their_cells():
    recent = RecentResults(max_cells=50)
    result = QueryResult(outcome=Outcome.ROWS, columns=("a",), rows=((1,),) * 10)  # 20 cells
    for name in ("one", "two"):
        recent.put((name, ""), result)
    assert recent.get(("one", "")) is result  # used again, so "two" is now the older
    recent.put(("three", ""), result)
    assert recent.get(("two", "")) is None
    assert recent.get(("one", "")) is result


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("QUERL_CACHE", str(tmp_path))
    assert default_cache_path() == tmp_path / "golds.sqlite"
    monkeypatch.delenv("QUERL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / "querl" / "golds.sqlite"


def test_the_judge_asks_the_cache_for_golds_and_the_database_for_answers(cache, database):
    task = Task(id="1", question="Who?", database=database, gold_sql=GOLD)

    async def run() -> int:
        async with CountingPool(1) as pool:
            for _ in range(2):
                judge = Judge(pool, golds=CachedGolds(pool, cache, Limits()))
                judgements = await asyncio.gather(*(judge.judge_sql(task, GOLD) for _ in range(3)))
                assert all(judgement.is_right for judgement in judgements)
            return pool.num_calls

    assert asyncio.run(run()) == 1 + 3 + 3  # one gold, and each answer
