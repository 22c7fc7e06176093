"""BIRD's layout, its format of predictions, and its numbers."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from querl.cli.app import app
from querl.data.registry import load_tasks
from querl.errors import DataError
from querl.eval.bird import time_ratios
from querl.eval.predictions import read_predictions
from querl.eval.score import score
from querl.sql.compare import CompareMode
from querl.sql.database import Limits
from querl.sql.worker import SqlitePool
from querl.types import QueryResult

TABLES = """
CREATE TABLE hero (id INTEGER PRIMARY KEY, name TEXT, height REAL);
INSERT INTO hero VALUES (1, 'Ant', 170), (2, 'Bat', 180), (3, 'Cat', 160);
"""
ROWS = [
    ("Who is tall?", "SELECT name FROM hero WHERE height > 175", "simple", "tall means > 175"),
    ("Name and height?", "SELECT name, height FROM hero", "simple", ""),
    ("Who is the shortest?", "SELECT name FROM hero ORDER BY height LIMIT 1", "challenging", ""),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "bird" / "dev_databases" / "heroes"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "heroes.sqlite")) as connection:
        connection.executescript(TABLES)
    rows = [
        {
            "question_id": 100 + number,
            "db_id": "heroes",
            "question": question,
            "evidence": evidence,
            "SQL": sql,
            "difficulty": difficulty,
        }
        for number, (question, sql, difficulty, evidence) in enumerate(ROWS)
    ]
    (tmp_path / "bird" / "dev.json").write_text(json.dumps(rows))
    return tmp_path


def write_predictions(root: Path, *answers: str | int) -> Path:
    path = root / "predict_dev.json"
    path.write_text(json.dumps({str(number): sql for number, sql in enumerate(answers)}))
    return path


def run(root: Path, path: Path) -> tuple[str, dict[str, Any]]:
    command = ["score", str(path), "--data", f"bird:{root / 'bird'}", "--judge", "bird"]
    result = CliRunner().invoke(
        app, [*command, "--json", str(root / "s.json")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output, json.loads((root / "s.json").read_text())


def test_a_task_has_its_evidence_and_difficulty(root: Path) -> None:
    task, *_ = load_tasks(f"bird:{root / 'bird'}", "dev")
    assert (task.evidence, task.difficulty, task.db_id) == ("tall means > 175", "simple", "heroes")
    assert task.gold_sql == ROWS[0][1]


def test_the_published_files_are_read(shared_data: Path) -> None:
    bird = shared_data / "data" / "bird"
    if not bird.is_dir():
        pytest.skip("the BIRD sample is not here")
    assert len(load_tasks(f"bird:{bird}", "dev@superhero")) == 129
    assert len(load_tasks(f"bird:{bird}", "mini_dev@superhero")) == 52
    assert len(load_tasks(f"bird:{bird}", "train_3dbs")) == 549
    with pytest.raises(DataError, match="california_schools"):
        load_tasks(f"bird:{bird}", "dev")


def test_queries_for_another_database_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match="use mini_dev"):
        load_tasks(f"bird:{root / 'bird'}", "mini_dev_postgresql")


def test_birds_own_prediction_files_are_read(root: Path) -> None:
    tasks = load_tasks(f"bird:{root / 'bird'}", "dev")
    path = write_predictions(root, "SELECT 1\t----- bird -----\theroes", "SELECT\n2", 0)
    assert read_predictions(path, tasks) == ["SELECT 1", "SELECT\n2", ""]
    wrong = write_predictions(root, "SELECT 1\t----- bird -----\tvillains", "", "")
    with pytest.raises(DataError, match="villains"):
        read_predictions(wrong, tasks)
    with pytest.raises(DataError, match="2 predictions for 3 questions"):
        read_predictions(write_predictions(root, "", ""), tasks)


def test_scores_come_overall_and_by_difficulty(root: Path) -> None:
    # right; half of the cells of every row; not run
    path = write_predictions(root, ROWS[0][1], "SELECT name, id FROM hero", "SELECT nothing")
    output, summary = run(root, path)
    assert summary["ex"] == pytest.approx(1 / 3)
    assert summary["soft_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary["r_ves"] == pytest.approx(1 / 3)  # the same text is as fast
    assert summary["by_difficulty"] == {
        "simple": {"n": 2, "ex": 0.5, "soft_f1": 0.75, "r_ves": 0.5},
        "challenging": {"n": 1, "ex": 0.0, "soft_f1": 0.0, "r_ves": 0.0},
    }
    assert "challenging" in output
    assert "R-VES" in output


def test_queries_are_timed_alone_though_there_are_more_workers(root: Path) -> None:
    most = live = 0

    class Counting(SqlitePool):
        async def execute(
            self, database: str, sql: str, limits: Limits | None = None
        ) -> QueryResult:
            nonlocal most, live
            live += 1
            most = max(most, live)
            try:
                return await super().execute(database, sql, limits)
            finally:
                live -= 1

    async def run() -> None:
        nonlocal most
        tasks = load_tasks(f"bird:{root / 'bird'}", "dev")[:1]
        async with Counting(2) as pool:
            scored = await score(tasks, [f"{ROWS[0][1]} "], pool, mode=CompareMode.BIRD)
            most = 0
            await time_ratios(scored, pool)

    asyncio.run(run())
    assert most == 1


def test_a_slow_right_answer_earns_less_than_a_fast_one(root: Path) -> None:
    tasks = load_tasks(f"bird:{root / 'bird'}", "dev")[:2]
    slow = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
        "SELECT name FROM hero WHERE height > 175 AND (SELECT count(*) FROM n) > 0"
    )

    async def ratios() -> list[float]:
        async with SqlitePool(1) as pool:
            scored = await score(tasks, [slow, "SELECT 1"], pool, mode=CompareMode.BIRD)
            return await time_ratios(scored, pool)

    slow_ratio, wrong_ratio = asyncio.run(ratios())
    assert 0 < slow_ratio < 0.25
    assert wrong_ratio == 0.0


def test_a_ratio_is_the_gold_s_time_over_the_answer_s_by_the_median_of_a_few_runs(
    root: Path,
) -> None:
    """The real rows, and times as if the machine had been so fast."""
    times_s: dict[str, list[float]] = {}

    class Timed(SqlitePool):
        async def execute(
            self, database: str, sql: str, limits: Limits | None = None
        ) -> QueryResult:
            result = await super().execute(database, sql, limits)
            return replace(result, seconds=times_s[sql].pop(0))

    async def ratio(gold_s: list[float], answer_s: list[float]) -> float:
        task = load_tasks(f"bird:{root / 'bird'}", "dev")[0]
        gold, answer = ROWS[0][1], f"{ROWS[0][1]} AND 1"
        times_s.update({gold: gold_s, answer: answer_s})
        num_done = 0

        def count() -> None:
            nonlocal num_done
            num_done += 1

        async with Timed(1) as pool:
            scored = await score([task], [answer], pool, mode=CompareMode.BIRD)
            (found,) = await time_ratios(scored, pool, count)
        assert num_done == 1
        return found

    async def run() -> None:
        # the first time of each is that of the judge; three runs of 0.6 s fit into two seconds
        assert await ratio([0.6, 4.0, 1.0, 6.0], [0.5, 2.0, 2.0, 2.0]) == 2.0
        # of a slow query one run is enough
        assert await ratio([5.0, 6.0], [3.0, 2.0]) == 3.0
        # a clock too coarse to tell takes no side
        assert await ratio([5.0, 6.0], [3.0, 0.0]) == 1.0
        assert times_s == {ROWS[0][1]: [], f"{ROWS[0][1]} AND 1": []}

    asyncio.run(run())
