"""`querl score`: known predictions get known scores, and the files keep their contract."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from querl.cli.app import app
from querl.data.audit import is_unstable
from querl.errors import ConfigError, DataError
from querl.eval.score import score
from querl.sql.compare import CompareMode
from querl.sql.suite import SuiteHead, SuiteQuestion, write_suite
from querl.sql.worker import SqlitePool
from querl.types import Task

TABLES = """
CREATE TABLE person (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, city TEXT);
INSERT INTO person VALUES (1, 'Ada', 36, 'London'), (2, 'Bob', 36, 'London');
INSERT INTO person VALUES (3, 'Cleo', 50, 'Rome');
"""

# gold, prediction, and the judges under which the prediction is right
CASES = [
    ("SELECT name FROM person", "select NAME from person", "spider strict bird"),
    ("SELECT city FROM person", "SELECT DISTINCT city FROM person", "spider bird"),
    ("SELECT name, age FROM person", "SELECT age, name FROM person", "spider"),
    ("SELECT name FROM person ORDER BY name", "SELECT name FROM person ORDER BY name DESC", "bird"),
    ("SELECT name FROM person", "SELECT name FROM person ORDER BY name DESC", "spider strict bird"),
    (
        "SELECT name FROM person WHERE age > 36",
        "SELECT name FROM person WHERE age > = 40",
        "spider",
    ),
    ("SELECT name FROM person WHERE id = 1", "SELECT name FROM person WHERE id = value", "spider"),
    (
        "SELECT name FROM person WHERE id = 9",
        "SELECT id, age FROM person WHERE id = 9",
        "spider bird",
    ),
    ("SELECT name FROM person WHERE id = 9", "DROP TABLE person", ""),
    ("SELECT name FROM person WHERE id = 9", "", ""),
    ("SELECT count(*) FROM person", "SELECT count(*) FROM persons", ""),
    ("SELECT count(*) FROM person", "SELECT 4", ""),
    ("SELECT nothing FROM person", "SELECT nothing FROM person", ""),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Spider's layout, with the gold queries of CASES."""
    folder = tmp_path / "spider" / "database" / "people"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "people.sqlite")) as connection:
        connection.executescript(TABLES)
    rows = [{"question": "q", "query": gold, "db_id": "people"} for gold, _, _ in CASES]
    (tmp_path / "spider" / "dev.json").write_text(json.dumps(rows))
    (tmp_path / "predictions.sql").write_text("".join(f"{sql}\n" for _, sql, _ in CASES))
    return tmp_path


def run(root: Path, *arguments: str, predictions: str = "predictions.sql") -> tuple[str, Any, Any]:
    """What the command printed, its JSON summary, its details."""
    json_file, details_file = root / "summary.json", root / "details.jsonl"
    outputs = ["--json", str(json_file), "--details", str(details_file)]
    command = ["score", str(root / predictions), "--data", f"spider:{root / 'spider'}"]
    result = CliRunner().invoke(app, [*command, *outputs, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    details = [json.loads(line) for line in details_file.read_text().splitlines()]
    return result.output, json.loads(json_file.read_text()), details


@pytest.mark.parametrize("judge", ["spider", "strict", "bird"])
def test_known_predictions_get_known_scores(root: Path, judge: str) -> None:
    _, summary, details = run(root, "--judge", judge)
    right = [judge in judges.split() for _, _, judges in CASES]
    assert [row["ex"] for row in details] == right
    assert summary["ex"] == pytest.approx(sum(right) / len(right))
    assert ("soft_f1" in summary) == ("r_ves" in summary) == (judge == "bird")


def test_spider_s_judge_rewrites_golds_as_well_and_no_other_does(root: Path) -> None:
    database = str(root / "spider" / "database" / "people" / "people.sqlite")
    gold = "SELECT name FROM person WHERE age < = 40"
    task = Task(id="t", question="q", database=database, gold_sql=gold)

    async def is_right(mode: CompareMode) -> bool:
        async with SqlitePool(1) as pool:
            sql = "SELECT name FROM person WHERE age < 40"
            (scored,) = await score([task], [sql], pool, mode=mode)
            return scored.ex

    assert asyncio.run(is_right(CompareMode.SPIDER))
    assert not asyncio.run(is_right(CompareMode.BIRD))


def test_keep_distinct_keeps_it(root: Path) -> None:
    _, _, details = run(root, "--keep-distinct")
    assert not details[1]["ex"]
    assert details[2]["ex"]


def test_the_files_keep_their_contract(root: Path) -> None:
    output, summary, details = run(root)
    assert (root / "spider" / "database" / "people" / "people.sqlite").exists()
    assert [row["index"] for row in details] == list(range(len(CASES)))
    assert {*details[0]} >= {"index", "db_id", "hardness", "verdict", "ex", "ts"}
    assert details[0] | {"outcome": None} == {
        "index": 0,
        "db_id": "people",
        "hardness": "easy",
        "verdict": "match",
        "ex": True,
        "ts": None,
        "outcome": None,
    }
    assert [row["verdict"] for row in details[8:]] == [
        "not_run",
        "no_answer",
        "not_run",
        "mismatch",
        "gold_failed",
    ]
    assert summary["n"] == len(CASES)
    assert summary["ts"] is None
    assert len(summary["ex_interval"]) == 2
    # all questions are on one database, so resampling databases changes nothing
    assert summary["ex_interval_databases"] is None  # one database tells of no other
    assert summary["verdicts"] == {
        "match": 7,
        "mismatch": 2,
        "not_run": 2,
        "no_answer": 1,
        "gold_failed": 1,
    }
    assert sum(level["n"] for level in summary["by_hardness"].values()) == len(CASES)
    assert {*summary["by_hardness"]["easy"]} == {"n", "ex", "ts"}
    assert summary["failing_golds"] == [12]
    assert "failing gold queries: 1  spider-dev-0012" in output


@pytest.fixture
def suites(root: Path) -> Path:
    """A folder of suite databases: the question's own, and one where other people live."""
    folder = root / "suites" / "people"
    folder.mkdir(parents=True)
    for name, more in (
        ("people", ""),
        ("others", "INSERT INTO person VALUES (4, 'Dan', 20, 'Oslo'), (9, 'Eve', 37, 'Bonn');"),
    ):
        with closing(sqlite3.connect(folder / f"{name}.sqlite")) as connection:
            connection.executescript(TABLES + more)
    return root / "suites"


def test_test_suite_accuracy_is_over_all_databases_of_the_folder(root: Path, suites: Path) -> None:
    _, plain, details_without = run(root)
    output, summary, details = run(root, "--databases", str(suites))
    assert [row["ex"] for row in details] == [row["ex"] for row in details_without]
    assert summary["ex"] == plain["ex"]
    # only there, someone is 37 and someone has the id 9
    lucky = [5, 7]
    assert [row["index"] for row in details if row["ex"] and not row["ts"]] == lucky
    assert summary["ts"] == pytest.approx(summary["ex"] - len(lucky) / len(CASES))
    assert all(level["ts"] is not None for level in summary["by_hardness"].values())
    low, high = summary["ts_interval"]
    assert low < summary["ts"] < high
    assert f"test-suite accuracy │ {100 * summary['ts']:.1f} %" in output


def test_a_built_suite_is_asked_by_gold_query(root: Path, suites: Path) -> None:
    others = (suites / "people" / "others.sqlite").read_bytes()
    head = SuiteHead(seed=0, databases_per_question=1, sqlite="any", sqlglot="any", querl="any")
    gold, _, _ = CASES[5]
    question = SuiteQuestion(
        db_id="people", gold_sql=gold, databases=("others",), num_mutants=0, killed=(0,)
    )
    (root / "built").mkdir()
    write_suite(root / "built", head, [question], {("people", "others"): others})
    _, summary, details = run(root, "--suite", str(root / "built"))
    # the one question that the suite knows is right by luck
    assert {row["index"]: row["ts"] for row in details if row["ts"] is not None} == {5: False}
    assert summary["ts"] == 0.0


def test_a_database_without_a_folder_has_no_test_suite_accuracy(root: Path, suites: Path) -> None:
    (suites / "people").rename(suites / "nobody")
    _, summary, details = run(root, "--databases", str(suites))
    assert summary["ts"] is summary["ts_interval"] is None
    assert {row["ts"] for row in details} == {None}


def test_a_question_that_no_suite_database_tells_has_no_test_suite_accuracy(
    root: Path, suites: Path
) -> None:
    for path in (suites / "people").iterdir():
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("DROP TABLE person")
    output, summary, details = run(root, "--databases", str(suites))
    right = [row for row in details if row["ex"]]
    assert {row["ts"] for row in right} == {None}
    assert {row["ts"] for row in details if not row["ex"]} == {False}
    assert summary["ts_n"] == len(CASES) - len(right)
    assert summary["failing_suite_golds"] == 2 * len(right)
    assert f"golds that fail on the suite │ {2 * len(right)}" in output


def test_a_bad_suite_database_is_passed_over_and_counted(root: Path, suites: Path) -> None:
    _, before, _ = run(root, "--databases", str(suites))
    (suites / "people" / "empty.sqlite").write_bytes(b"")
    (suites / "people" / "junk.sqlite").write_bytes(b"no database at all" * 50)
    _, summary, details = run(root, "--databases", str(suites))
    assert (summary["ts"], summary["ts_n"]) == (before["ts"], len(CASES))
    assert summary["failing_suite_golds"] == 2 * sum(row["ex"] for row in details)


def test_a_bad_database_fails_its_own_questions_and_is_named(root: Path) -> None:
    folder = root / "spider" / "database" / "junk"
    folder.mkdir()
    (folder / "junk.sqlite").write_bytes(b"no database at all" * 50)
    rows = json.loads((root / "spider" / "dev.json").read_text())
    rows[0]["db_id"] = "junk"
    (root / "spider" / "dev.json").write_text(json.dumps(rows))
    output, summary, details = run(root)
    assert [row["verdict"] for row in details[:2]] == ["gold_failed", "match"]
    assert summary["failing_golds"] == [0, 12]
    (fault,) = summary["bad_databases"]
    assert "junk.sqlite" in fault
    assert f"not judged: {fault}" in output
    only_bad = [{**row, "db_id": "junk"} for row in rows]
    (root / "spider" / "dev.json").write_text(json.dumps(only_bad))
    with pytest.raises(DataError, match=r"junk\.sqlite"):
        run(root)


def test_questions_with_the_same_id_keep_their_own_suites(root: Path, suites: Path) -> None:
    database = str(root / "spider" / "database" / "people" / "people.sqlite")
    other = str(suites / "people" / "others.sqlite")
    golds = ("SELECT name FROM person WHERE age > 36", "SELECT count(*) FROM person WHERE id = 9")

    class OfTheFirst:
        def databases(self, task: Task) -> tuple[str, ...]:
            return (other,) if task.gold_sql == golds[0] else ()

    async def scored() -> list[bool | None]:
        tasks = [Task(id="same", question="q", database=database, gold_sql=sql) for sql in golds]
        async with SqlitePool(1) as pool:
            return [one.ts for one in await score(tasks, golds, pool, suite=OfTheFirst())]

    assert asyncio.run(scored()) == [True, None]


def test_a_suite_of_other_questions_is_refused(root: Path) -> None:
    head = SuiteHead(seed=0, databases_per_question=1, sqlite="any", sqlglot="any", querl="any")
    (root / "built").mkdir()
    write_suite(root / "built", head, [], {})
    with pytest.raises(DataError, match="knows none of the questions"):
        run(root, "--suite", str(root / "built"))


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_one_line(root: Path) -> None:
    with pytest.raises(DataError, match="name a file of predictions"):
        run(root, predictions="spider")
    with pytest.raises(DataError, match="querl suite build"):
        run(root, "--suite", str(root / "predictions.sql"))


def test_two_suites_at_once_are_refused(root: Path, suites: Path) -> None:
    with pytest.raises(ConfigError, match="give one"):
        run(root, "--databases", str(suites), "--suite", str(suites))


def test_jsonl_predictions_may_come_in_any_order(root: Path) -> None:
    lines = [json.dumps({"index": n, "sql": sql}) for n, (_, sql, _) in enumerate(CASES)]
    (root / "predictions.jsonl").write_text("\n".join(reversed(lines)))
    _, from_lines, details_of_lines = run(root)
    _, from_jsonl, details_of_jsonl = run(root, predictions="predictions.jsonl")
    assert (from_jsonl, details_of_jsonl) == (from_lines, details_of_lines)


def test_a_wrong_number_of_lines_is_refused(root: Path) -> None:
    (root / "short.sql").write_text("SELECT 1\n")
    with pytest.raises(DataError, match="1 predictions for 13 questions"):
        run(root, predictions="short.sql")
    assert not (root / "summary.json").exists()


def test_a_gold_that_hangs_on_the_order_of_rows_is_unstable(root: Path) -> None:
    database = str(root / "spider" / "database" / "people" / "people.sqlite")

    def unstable(sql: str, mode: CompareMode = CompareMode.SPIDER) -> bool:
        return is_unstable(Task(id="t", question="q", database=database, gold_sql=sql), mode)

    assert unstable("SELECT name FROM person LIMIT 1")
    assert unstable("SELECT group_concat(name) FROM person", CompareMode.BIRD)
    assert unstable("SELECT name FROM person WHERE id IN (SELECT id FROM person LIMIT 1)")
    assert not unstable("SELECT name FROM person")
    assert not unstable("SELECT name FROM person ORDER BY name LIMIT 1")
    assert not unstable("SELECT nothing FROM person LIMIT 1")


def test_spider_dev_gold_scores_one_against_itself(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "spider").symlink_to(shared_data / "spider")
    (tmp_path / "gold.sql").symlink_to(shared_data / "spider" / "dev_gold.sql")
    _, summary, details = run(tmp_path, predictions="gold.sql")
    assert (summary["n"], summary["ex"], summary["failing_golds"]) == (1034, 1.0, [])
    assert {level: row["n"] for level, row in summary["by_hardness"].items()} == {
        "easy": 248,
        "medium": 446,
        "hard": 174,
        "extra": 166,
    }
    assert summary["shares"]["runs"] == 1.0
    assert all(row["ex"] for row in details)
