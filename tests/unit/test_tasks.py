from __future__ import annotations

from pathlib import Path

import pytest
from company import make_database

from querl.config import load_recipe
from querl.errors import DataError
from querl.launch.tasks import choose_tasks, fair_sample
from querl.types import Task


def own_questions(folder: Path, count: int) -> tuple[str, str]:
    database = folder / "company.sqlite"
    make_database(database)
    rows = [
        f'"How many? ({i})","SELECT count(*) FROM employees LIMIT {i + 1}"' for i in range(count)
    ]
    questions = folder / "questions.csv"
    questions.write_text("question,sql\n" + "\n".join(rows) + "\n")
    return f"data.db={database}", f"data.questions={questions}"


def test_own_questions_are_split_by_question_and_always_alike(tmp_path: Path) -> None:
    recipe = load_recipe(None, own_questions(tmp_path, 20))
    training, validation = choose_tasks(recipe)
    assert len(training) == 16
    assert len(validation) == 4
    assert not {task.id for task in training} & {task.id for task in validation}
    assert choose_tasks(recipe) == (training, validation)


def test_one_question_is_too_little(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two different ones are needed"):
        choose_tasks(load_recipe(None, own_questions(tmp_path, 1)))


def test_the_demo_validates_on_databases_that_training_never_sees() -> None:
    training, validation = choose_tasks(load_recipe(None))
    assert len(training) >= 800
    assert len(validation) >= 200
    assert not {task.database for task in training} & {task.database for task in validation}
    assert len({task.database for task in training + validation}) >= 12


def test_a_share_of_databases_can_be_held_out() -> None:
    training, validation = choose_tasks(load_recipe(None, ("data.validation=databases:0.3",)))
    assert not {task.db_id for task in training} & {task.db_id for task in validation}


def test_as_many_as_there_are_come_in_their_own_order() -> None:
    tasks = [Task(id=str(n), question="q", database="d") for n in range(9)]
    assert fair_sample(tasks, 9, seed=0) == fair_sample(tasks, None, seed=0) == tasks
    some = fair_sample(tasks, 8, seed=0)
    assert len({task.id for task in some}) == 8
    assert some != sorted(some, key=lambda task: task.id)
