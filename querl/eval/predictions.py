"""Files of predictions: Spider's own format (one SQL a line) or JSON Lines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from querl.errors import DataError
from querl.types import Task

_SPLIT_OPERATORS = {"> =": ">=", "< =": "<=", "! =": "!="}
_CURRENT_YEAR = re.compile(r"YEAR\s*\(\s*CURDATE\s*\(\s*\)\s*\)\s*", re.IGNORECASE)
_VALUE_PLACEHOLDER = "value"
_BIRD_SEPARATOR = "\t----- bird -----\t"


def read_predictions(path: Path, tasks: Sequence[Task]) -> list[str]:
    r"""The predicted SQL of each task, in the order of the tasks; '' where there is none.

    A text file has a line a task, ``SQL`` or ``SQL\tdb_id``; an empty line is no answer. A file
    whose first character is ``{`` has an object a task, with ``sql`` and optionally ``index`` (from
    0) and ``task`` (its id), or an empty line for no answer; or it is BIRD's: one object, from
    ``"0"``, ``"1"``, ... to ``SQL\t----- bird -----\tdb_id``.
    Raises DataError for another number of predictions or another task's database.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: name a file of predictions") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): name a file of predictions"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    if text.lstrip().startswith("{"):
        answers = _bird_answers(text)
        if answers is not None:
            return _read_bird(path, answers, tasks)
        return _read_jsonl(path, text, tasks)
    return _read_lines(path, text, tasks)


def official_gold(sql: str) -> str:
    """A gold query as Spider's evaluator rewrites it before it runs."""
    for wrong, right in _SPLIT_OPERATORS.items():
        sql = sql.replace(wrong, right)
    return _CURRENT_YEAR.sub("2020", sql)


def official_prediction(sql: str) -> str:
    """A predicted query as Spider's evaluator rewrites it: ``value`` is its placeholder for 1."""
    return official_gold(sql.replace(_VALUE_PLACEHOLDER, "1"))


def _read_lines(path: Path, text: str, tasks: Sequence[Task]) -> list[str]:
    lines = _lines(path, text, len(tasks))
    known = {task.db_id for task in tasks}
    predictions = []
    for number, (line, task) in enumerate(zip(lines, tasks, strict=True), start=1):
        sql, _, db_id = line.rpartition("\t")
        if db_id.strip() not in known:
            sql, db_id = line, task.db_id
        if db_id.strip() != task.db_id:
            raise DataError(
                f"{path}, line {number} is about database {db_id.strip()!r}, its question about "
                f"{task.db_id!r}: keep the lines in the order of the questions"
            )
        predictions.append(sql.strip())
    return predictions


def _read_jsonl(path: Path, text: str, tasks: Sequence[Task]) -> list[str]:
    predictions: dict[int, str] = {}
    num_tasks = len(tasks)
    numbered = list(enumerate(text.split("\n"), start=1))
    answers = [(number, line) for number, line in numbered if line.strip()]
    if len(answers) != num_tasks:  # else an empty line is nobody's
        answers = numbered[: len(_lines(path, text, num_tasks))]
    for position, (number, line) in enumerate(answers):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("sql", 0), str | None):
            raise DataError(f'{where}: write {{"index": {position}, "sql": "SELECT ..."}}')
        index = row.get("index", position)
        if not isinstance(index, int) or not 0 <= index < num_tasks or index in predictions:
            raise DataError(
                f"{where}: index {index!r} is used twice or is none of 0 to {num_tasks - 1}: "
                "give each question one line"
            )
        if row.get("task", tasks[index].id) != tasks[index].id:
            raise DataError(
                f"{where} answers task {row['task']!r}, question {index} is {tasks[index].id!r}: "
                "name the data and split that were answered, all of it and in its order"
            )
        predictions[index] = (row["sql"] or "").strip()
    return [predictions.get(index, "") for index in range(num_tasks)]


def _bird_answers(text: str) -> dict[str, Any] | None:
    """The one object of a file in BIRD's format; None for any other."""
    try:
        answers = json.loads(text)
    except ValueError:
        return None
    return answers if all(key.isdecimal() for key in answers) else None


def _read_bird(path: Path, answers: dict[str, Any], tasks: Sequence[Task]) -> list[str]:
    _check_number(path, len(answers), len(tasks))
    predictions = []
    for index, task in enumerate(tasks):
        answer = answers.get(str(index), 0)
        # an answer that is none is the number 0 in BIRD's own files
        if answer == 0 and str(index) in answers:
            answer = ""
        if not isinstance(answer, str):
            raise DataError(
                f'{path} has no text for question {index}: write "{index}": "SELECT ..."'
            )
        sql, separator, db_id = answer.rpartition(_BIRD_SEPARATOR)
        if separator and db_id.strip() != task.db_id:
            raise DataError(
                f"{path}, question {index} is about database {db_id.strip()!r}, its question about "
                f"{task.db_id!r}: keep the order of the questions"
            )
        predictions.append((sql if separator else answer).strip())
    return predictions


def _lines(path: Path, text: str, num_tasks: int) -> list[str]:
    """One line a task; the file's last newline begins none, unless an (empty) answer is due."""
    lines = text.split("\n")
    if not lines[-1] and len(lines) != num_tasks:
        lines.pop()
    _check_number(path, len(lines), num_tasks)
    return lines


def _check_number(path: Path, num_predictions: int, num_tasks: int) -> None:
    if num_predictions != num_tasks:
        raise DataError(
            f"{path} has {num_predictions:,} predictions for {num_tasks:,} questions: "
            "give one a line for every question, an empty line where there is no answer"
        )
