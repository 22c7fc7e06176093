"""Files of predictions in each form, and the one line that each fault gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from querl.errors import DataError
from querl.eval.predictions import official_gold, official_prediction, read_predictions
from querl.types import Task

TASKS = [Task(id=str(n), question="q", database=f"/x/{db}.sqlite") for n, db in enumerate("aab")]


def read(folder: Path, text: str) -> list[str]:
    path = folder / "predictions"
    path.write_text(text, newline="")
    return read_predictions(path, TASKS)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1\n\nSELECT\t3\n",
        "SELECT 1\r\n\r\nSELECT\t3\r\n",
        "SELECT 1\n\nSELECT\t3",
        "SELECT 1\ta\n\ta\nSELECT\t3\tb\n",
        '{"sql": "SELECT 1"}\n{"sql": null}\n{"sql": "SELECT\\t3"}\n',
        '{"index": 2, "sql": "SELECT\\t3"}\n{"index": 0, "sql": "SELECT 1"}\n\n'
        '{"index": 1, "sql": ""}',
    ],
)
def test_every_form_gives_one_query_a_question(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == ["SELECT 1", "", "SELECT\t3"]


def test_an_empty_last_line_is_an_answer_when_one_is_due(tmp_path: Path) -> None:
    assert read(tmp_path, "SELECT 1\nSELECT 2\n") == ["SELECT 1", "SELECT 2", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SELECT 1\n", "has 1 predictions for 3 questions"),
        ("SELECT 1\n" * 4, "has 4 predictions for 3 questions"),
        ("SELECT 1\n" * 3 + "SELECT 1", "has 4 predictions for 3 questions"),
        ("SELECT 1\ta\nSELECT 1\tb\nSELECT 1\tb\n", "line 2 is about database 'b'"),
        ('{"sql": "SELECT 1"}\n', "has 1 predictions for 3 questions"),
        ('{"sql": "SELECT 1"}\n{"sql"\n{}\n', "line 2 is not JSON"),
        ('{"sql": "SELECT 1"}\n{"query": "SELECT 1"}\n{}\n', 'line 2: write {"index": 1, "sql"'),
        ('{"sql": "SELECT 1"}\n{"sql": 3}\n{}\n', "line 2: write"),
        ('{"index": 1, "sql": ""}\n' * 3, "line 2: index 1 is used twice"),
        ('{"index": 3, "sql": ""}\n' * 3, "line 1: index 3 is used twice or is none of 0 to 2"),
    ],
)
def test_each_fault_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_to_another_task_is_refused_where_it_says_which(tmp_path: Path) -> None:
    lines = [f'{{"index": {n}, "task": "{n}", "sql": "SELECT {n}"}}' for n in range(3)]
    assert read(tmp_path, "\n".join(lines)) == ["SELECT 0", "SELECT 1", "SELECT 2"]
    shuffled = lines[1].replace('"index": 1', '"index": 0')
    with pytest.raises(DataError, match="line 1 answers task '1', question 0 is '0'"):
        read(tmp_path, "\n".join([shuffled, *lines[1:]]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_predictions(tmp_path / "no.sql", TASKS)
    (tmp_path / "bad.sql").write_bytes(b"SELECT '\xff'\n")
    with pytest.raises(DataError, match=r"bad\.sql is not UTF-8"):
        read_predictions(tmp_path / "bad.sql", TASKS)


def test_queries_are_rewritten_as_the_official_evaluator_does() -> None:
    written = "SELECT a FROM t WHERE b > = value AND c ! = YEAR ( curdate() )"
    assert official_prediction(written) == "SELECT a FROM t WHERE b >= 1 AND c != 2020"
    assert official_gold("SELECT value FROM t WHERE b < = 2") == "SELECT value FROM t WHERE b <= 2"


def test_an_empty_line_in_the_place_of_an_object_is_no_answer(tmp_path: Path) -> None:
    assert read(tmp_path, '{"sql": "A"}\n\n{"sql": "C"}\n') == ["A", "", "C"]
    indexed = '{"sql": "A", "index": 2}\n\n{"sql": "C", "index": 0}\n'
    assert read(tmp_path, indexed) == ["C", "", "A"]
