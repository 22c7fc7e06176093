"""What the sandbox lets through, where its limits lie, and what it makes of bad files."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from querl.errors import DataError
from querl.sql.database import Limits
from querl.sql.sqlite import OutOfTime, SqliteRunner, run_query
from querl.types import Outcome

LIMITS = Limits(max_steps=2_000_000, timeout_s=10)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("sandbox") / "shop.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            """
            CREATE TABLE Item (id INTEGER PRIMARY KEY, label TEXT, price REAL, tags TEXT, day TEXT);
            CREATE VIEW cheap AS SELECT label FROM item WHERE price < 5;
            CREATE VIEW clock AS SELECT date('now') AS today;
            CREATE TABLE pairs AS WITH RECURSIVE r(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM r
              LIMIT 300) SELECT x, x * x AS square FROM r;
            INSERT INTO Item VALUES (1, 'cup', 4.5, '["red", "blue"]', '2020-02-29'),
              (2, 'jug', 9.0, '[]', 'now');
            """
        )
        connection.commit()
    return str(path)


@pytest.fixture(scope="module")
def runner():
    with SqliteRunner() as runner:
        yield runner


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT label FROM iTEM WHERE id = 1", (("cup",),)),
        ("SELECT label FROM cheap", (("cup",),)),
        ("VALUES (1, 'a')", ((1, "a"),)),
        ("SELECT 1;", ((1,),)),
        ("SELECT 1; -- done", ((1,),)),
        ("SELECT 1;; -- done\n /* well */ ;", ((1,),)),
        ("/* first */ SELECT 'a;b'", (("a;b",),)),
        ("WITH x AS (SELECT 2 AS y) SELECT y FROM x", ((2,),)),
        ("SELECT count(*) FROM sqlite_master WHERE type = 'table'", ((2,),)),
        ("SELECT value FROM Item, json_each(tags)", (("red",), ("blue",))),
        ("SELECT count(*) FROM Item, json_tree(Item.tags)", ((4,),)),
        ("SELECT tags ->> 0 FROM Item WHERE id = 1", (("red",),)),
        ("SELECT sum(price) OVER (ORDER BY id) FROM Item", ((4.5,), (13.5,))),
        ("SELECT label FROM Item WHERE label LIKE 'C%' OR label GLOB 'j*'", (("cup",), ("jug",))),
        ("SELECT x'00ff', 1e999, CAST(9 AS TEXT)", ((b"\x00\xff", float("inf"), "9"),)),
    ],
)
def test_reading_works(runner, database, sql, rows):
    result = runner.run(database, sql, LIMITS)
    assert (result.outcome, result.rows, result.message) == (Outcome.ROWS, rows, "")


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) SELECT count(*) FROM r",
        "SELECT count(*) FROM pairs a, pairs b, pairs c",
        "SELECT a.x FROM pairs a, pairs b, pairs c ORDER BY a.square + b.square + c.square LIMIT 1",
        "SELECT sum(length(a.x || b.x || c.x)) FROM pairs a, pairs b, pairs c GROUP BY a.x % 7",
    ],
)
def test_bombs_that_step_are_over_budget_at_the_same_step_each_time(runner, database, sql):
    first, second = (runner.run(database, sql, LIMITS) for _ in range(2))
    assert first.outcome is Outcome.OVER_BUDGET
    assert first.message == "no result within 2,000,000 steps"
    assert first.steps == second.steps == 2_000_000


def test_steps_are_those_that_sqlite_itself_counts(runner, database):
    sql = "SELECT count(*) FROM pairs a, pairs b WHERE a.x < b.square"
    num_hundreds = 0

    def count() -> None:
        nonlocal num_hundreds
        num_hundreds += 1

    with closing(sqlite3.connect(database)) as connection:
        connection.set_progress_handler(count, 100)
        connection.execute(sql).fetchall()
    steps = runner.run(database, sql, LIMITS).steps
    assert steps == pytest.approx(100 * num_hundreds, abs=2_000)  # counted by the thousand
    assert steps > 100_000


def test_a_query_over_its_budget_leaves_the_schema_readable(tmp_path):
    path = tmp_path / "wide.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("".join(f"CREATE TABLE t{n} (a, b, c);" for n in range(100)))
    endless = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT 1 FROM r) SELECT sum(x) FROM r"
    with SqliteRunner() as runner:
        result = runner.run(str(path), endless, LIMITS)
        assert result.outcome is Outcome.OVER_BUDGET
        assert len(runner.schema(str(path)).tables) == 100


def test_reading_the_schema_leaves_every_guard_up(database):
    long = "SELECT count(*) FROM pairs a, pairs b, pairs c LIMIT 1"
    with SqliteRunner() as runner:
        runner.schema(database)
        results = [runner.run(database, sql, LIMITS) for sql in (long, "SELECT random()")]
    assert [result.outcome for result in results] == [Outcome.OVER_BUDGET, Outcome.REFUSED]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT replace(printf('%.*c', 500000, 'x'), 'x', 'yyy')",
        "SELECT group_concat(printf('%.*c', 9999, 'x')) FROM pairs",
        "SELECT hex(printf('%.*c', 999999, 'x'))",
    ],
)
def test_a_value_beyond_the_cell_limit_is_too_large(runner, database, sql):
    result = runner.run(database, sql, LIMITS)
    assert (result.outcome, result.rows) == (Outcome.TOO_LARGE, ())


def test_a_result_of_many_bytes_is_too_large_before_it_is_whole(runner, database):
    sql = "SELECT printf('%.*c', 999999, 'x') FROM pairs"
    result = runner.run(database, sql, Limits(max_bytes=3_000_000, max_rows=10**9))
    assert result.outcome is Outcome.TOO_LARGE


def test_a_stored_value_beyond_the_cell_limit_is_too_large(tmp_path):
    path = tmp_path / "big.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (x, y)")
        connection.execute("INSERT INTO t VALUES (1, zeroblob(2000000))")
    assert run_query(path, "SELECT y FROM t").outcome is Outcome.TOO_LARGE


def test_past_the_wall_clock_the_runner_says_so_and_run_query_calls_it_over_budget(database):
    sql = "SELECT count(*) FROM pairs a, pairs b, pairs c, pairs d"
    limits = Limits(max_steps=10**12, timeout_s=0.05)
    with SqliteRunner() as runner, pytest.raises(OutOfTime):
        runner.run(database, sql, limits)
    assert run_query(database, sql, limits).outcome is Outcome.OVER_BUDGET


def test_steps_do_not_depend_on_what_ran_before(database):
    sql = "SELECT a.x, count(*) FROM pairs a JOIN pairs b ON a.x < b.x GROUP BY a.x"
    with SqliteRunner() as fresh:
        alone = fresh.run(database, sql, LIMITS).steps
    with SqliteRunner() as used:
        used.run(database, "SELECT * FROM pairs", LIMITS)
        used.run(database, "SELECT nonsense", LIMITS)
        later = [used.run(database, sql, LIMITS).steps for _ in range(3)]
    assert alone
    assert later == [alone] * 3


NOW = "2024-01-01 00:00:00"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("date()", "2024-01-01"),
        ("date('NOW', '+1 day')", "2024-01-02"),
        ("datetime('now', 'localtime')", NOW),
        ("\"date\"('now')", "2024-01-01"),
        ("date/**/('now')", "2024-01-01"),
        ("CURRENT_DATE", "2024-01-01"),
        ("Current_Timestamp", NOW),
        ("current_time", "00:00:00"),
        ("strftime('%Y')", "2024"),
        ("strftime('%Y', 'now', '-1 year')", "2023"),
        ("julianday('now') - julianday('2023-12-31')", 1.0),
        ("date('2020-02-29', '+1 year')", "2021-03-01"),
        ("date('no date')", None),
        ("(SELECT group_concat(date(day)) FROM Item)", "2020-02-29,2024-01-01"),
        ("(SELECT today FROM clock)", "2024-01-01"),
        ("julianday(x'6e4f77') - julianday('2023-12-31')", 1.0),
        ("datetime('now' || char(0) || 'z', x'6c6f63616c74696d65')", NOW),
        ("\"datetime\"\ufeff('now')", NOW),
        ("date(x'ff')", None),
        pytest.param(
            "datetime('Subsec')",
            NOW + ".000",
            marks=pytest.mark.skipif(
                sqlite3.sqlite_version_info < (3, 42), reason="not yet a word for now"
            ),
        ),
    ],
)
def test_the_clock_is_frozen(database, expression, value):
    result = run_query(database, f"SELECT {expression}", now=NOW)
    assert result.rows == ((value,),)


def test_the_frozen_moment_is_a_parameter(database):
    result = run_query(database, "SELECT datetime('now')", now="1999-12-31 23:59:59")
    assert result.rows == (("1999-12-31 23:59:59",),)


def test_a_day_that_is_not_utf8_is_no_day(tmp_path):
    path = tmp_path / "latin.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (day, days)")
        connection.execute("INSERT INTO t VALUES (CAST(x'ff' AS TEXT), 1), ('2020-02-28', 2)")
    result = run_query(path, "SELECT date(day, '+' || abs(days) || ' days'), date('now') FROM t")
    assert result.rows == ((None, "2024-01-01"), ("2020-03-01", "2024-01-01"))
    assert result.columns == ("date(day, '+' || abs(days) || ' days')", "date('now')")


def test_text_that_is_not_utf8_is_decoded_with_replacement(tmp_path):
    path = tmp_path / "latin.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (CAST(x'63616665e9' AS TEXT)), ('fine')")
    assert run_query(path, "SELECT x FROM t").rows == (("cafe\ufffd",), ("fine",))


@pytest.mark.parametrize(
    "name",
    ["a b.sqlite", "it's.sqlite", "50%?x=1#y.sqlite", "données😀.sqlite", 'q"q.sqlite', "x" * 253],
)
def test_a_file_may_have_any_name(database, tmp_path, name):
    shutil.copy(database, tmp_path / name)
    assert run_query(tmp_path / name, "SELECT count(*) FROM Item").rows == ((2,),)


def test_a_relative_path_is_relative_to_the_working_folder(database, monkeypatch):
    monkeypatch.chdir(Path(database).parent)
    assert run_query("shop.sqlite", "SELECT 1").outcome is Outcome.ROWS


def test_names_with_quotes_and_emoji_survive(tmp_path):
    path = tmp_path / "odd.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute('CREATE TABLE "ta""ble 😀" ("co\'l" PRIMARY KEY, "select" "my type")')
        connection.execute('CREATE TABLE child (a REFERENCES "ta""ble 😀")')
    with SqliteRunner() as runner:
        schema = runner.schema(str(path))
        result = runner.run(str(path), 'SELECT "co\'l", "select" FROM "ta""ble 😀"', LIMITS)
    assert schema.tables[0].name == 'ta"ble 😀'
    assert [(c.name, c.type) for c in schema.tables[0].columns] == [
        ("co'l", ""),
        ("select", "my type"),
    ]
    assert schema.tables[1].foreign_keys[0].other_columns == ("co'l",)  # the key named no column
    assert result.columns == ("co'l", "select")


def write_text(path: Path) -> None:
    path.write_text("name,price\ncup,4\n")


def write_header_only(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no database"),
        (Path.mkdir, "not a file"),
        (Path.touch, "empty file"),
        (os.mkfifo, "not a file"),
        (write_text, "not an SQLite database"),
        (write_header_only, "not a usable"),
    ],
    ids=["missing", "folder", "empty", "pipe", "text", "damaged header"],
)
def test_a_bad_file_is_a_data_error_that_names_it(tmp_path, make, words):
    path = tmp_path / "bad.sqlite"
    make(path)
    with SqliteRunner() as runner:
        with pytest.raises(DataError, match=words) as error:
            runner.run(str(path), "SELECT 1", LIMITS)
        assert "bad.sqlite" in str(error.value)
        with pytest.raises(DataError, match=words):
            runner.run(str(path), "DROP TABLE x", LIMITS)
        with pytest.raises(DataError, match=words):
            runner.schema(str(path))


def test_a_file_damaged_in_the_middle_is_a_data_error(database, tmp_path):
    path = tmp_path / "torn.sqlite"
    data = bytearray(Path(database).read_bytes())
    data[4096:] = b"\xee" * (len(data) - 4096)
    path.write_bytes(data)
    with SqliteRunner() as runner, pytest.raises(DataError, match="torn"):
        runner.run(str(path), "SELECT count(*), max(label), max(square) FROM Item, pairs", LIMITS)


def test_a_file_that_is_replaced_or_rewritten_is_read_anew(tmp_path):
    path = tmp_path / "moving.sqlite"

    def write(target: Path, table: str) -> None:
        with closing(sqlite3.connect(target)) as connection:
            connection.execute(f"CREATE TABLE {table} (x)")

    with SqliteRunner(immutable=True) as runner:
        write(path, "first")
        assert runner.run(str(path), "SELECT * FROM first", LIMITS).outcome is Outcome.ROWS
        write(tmp_path / "new", "second")
        (tmp_path / "new").rename(path)
        assert runner.run(str(path), "SELECT * FROM second", LIMITS).outcome is Outcome.ROWS
        write(path, "third")
        assert runner.run(str(path), "SELECT * FROM third", LIMITS).outcome is Outcome.ROWS
        path.unlink()
        with pytest.raises(DataError, match="moving"):
            runner.run(str(path), "SELECT 1", LIMITS)


def test_a_database_in_wal_mode_is_read_without_writing(tmp_path):
    path = tmp_path / "wal.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        connection.commit()
    assert run_query(path, "SELECT count(*) FROM t").rows == ((0,),)
    assert os.listdir(tmp_path) == ["wal.sqlite"]


def test_a_database_that_is_locked_is_undecided(database, tmp_path):
    path = tmp_path / "busy.sqlite"
    shutil.copy(database, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer, SqliteRunner() as runner:
        assert runner.run(str(path), "SELECT 1 FROM Item", LIMITS).outcome is Outcome.ROWS
        writer.execute("BEGIN EXCLUSIVE")
        assert runner.run(str(path), "SELECT 1 FROM Item", LIMITS).outcome is Outcome.UNDECIDED


def test_only_so_many_files_stay_open(database, tmp_path):
    copies = [tmp_path / f"{i}.sqlite" for i in range(12)]
    for copy in copies:
        shutil.copy(database, copy)
    with SqliteRunner(max_connections=4) as runner:
        before = len(os.listdir("/dev/fd"))
        for copy in copies * 2:
            assert runner.run(str(copy), "SELECT id FROM Item", LIMITS).outcome is Outcome.ROWS
        assert len(os.listdir("/dev/fd")) <= before + 4
    assert len(os.listdir("/dev/fd")) <= before
