"""`querl train` on a database of one's own: which recipe runs, and what a warm start is made of."""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from company import GOLDS, make_database
from console import Querl

from querl.cli.own import MODEL_RECIPE, TINY_RECIPE, Named, choose
from querl.cli.paths import Kept, recipe_of
from querl.cli.train import about_the_model
from querl.config import Recipe, load_recipe
from querl.env.schema_text import DescribedSchemas, ShownValues
from querl.errors import ConfigError
from querl.launch.local import TINY_FOLDER, make_env, model_path, open_databases
from querl.launch.own import warm_questions
from querl.launch.tasks import MADE, choose_tasks, given_away_by
from querl.launch.traces import make_traces
from querl.sql.schema import SchemaStyle
from querl.sql.worker import SqlitePool
from querl.trainer.model import load_tokenizer
from querl.types import Message, Task

NOBODY = Named(db=None, questions=None, model=None)
NUM_TABLES = 1000


@pytest.mark.parametrize("recipe", [TINY_RECIPE, MODEL_RECIPE])
def test_the_recipes_in_the_package_are_good(recipe: Path) -> None:
    assert load_recipe(recipe).prompt.max_schema_tokens > 0


def test_options_stand_for_keys_with_a_recipe_or_without() -> None:
    named = Named(db="data/my shop.sqlite", questions="q.csv", model="2024")
    chosen = choose(["recipes/demo.toml", "run.seed=3"], named)
    assert (chosen.recipe, chosen.name) == (Path("recipes/demo.toml"), "demo")
    own = choose(["run.seed=3"], named)
    assert (own.recipe, own.name, own.warms_up) == (MODEL_RECIPE, "my shop", False)
    recipe = load_recipe(own.recipe, own.overrides)
    assert (recipe.data.db, recipe.data.questions) == ("data/my shop.sqlite", "q.csv")
    assert (recipe.model.path, recipe.run.seed) == ("2024", 3)


def test_without_a_model_the_tiny_one_is_warmed_up() -> None:
    chosen = choose([], Named(db="postgresql://host/shop?x=1", questions="q.csv", model=None))
    assert (chosen.recipe, chosen.name, chosen.warms_up) == (TINY_RECIPE, "shop", True)


def test_a_model_that_an_override_names_is_trained_as_one_that_the_option_names() -> None:
    named = Named(db="shop.sqlite", questions="q.csv", model=None)
    chosen = choose(["run.seed=3", "model.path=models/qwen"], named)
    assert (chosen.recipe, chosen.warms_up) == (MODEL_RECIPE, False)
    assert load_recipe(chosen.recipe, chosen.overrides).model.path == "models/qwen"


@pytest.mark.parametrize("db", [".", "..", "./"])
def test_a_folder_without_a_name_gives_its_run_one(db: str) -> None:
    assert choose([], Named(db=db, questions="q.csv", model=None)).name == "own"


def test_what_is_missing_is_named_with_the_remedy(querl: Querl, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--db and --questions"):
        choose(["run.seed=1"], NOBODY)
    code, _, err = querl("train", "--db", tmp_path / "shop.sqlite", "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert f"querl data synth --db {tmp_path / 'shop.sqlite'}" in err
    assert not (tmp_path / "run").exists()


def test_a_server_has_no_questions_made_and_its_password_is_not_printed(
    querl: Querl, tmp_path: Path
) -> None:
    url = "postgresql://reader:secret@localhost:1/shop"
    code, _, err = querl("train", "--db", url)
    assert (code, err) == (2, "querl: --questions is missing: name a file of them\n")
    (tmp_path / "q.csv").write_text("question,sql\nHow many?,SELECT 1\nWho?,SELECT 2\n")
    named = ("--db", url, "--questions", tmp_path / "q.csv")
    for command in (("train", *named, "--out", tmp_path / "run"), ("data", "audit", *named)):
        code, told, err = querl(*command)
        assert code == 0 if command[0] == "data" else 2
        assert "localhost:1/shop" in told + err
        assert "secret" not in told + err


def test_a_warm_start_gives_no_validation_task_away(tmp_path: Path) -> None:
    database = tmp_path / "company.sqlite"
    make_database(database)
    golds = [
        Task(id=question, question=question, database=str(database), gold_sql=sql)
        for question, sql in GOLDS.items()
    ]
    everything = warm_questions(golds, [], seed=0)
    trained_on = {given_away_by(task) for task in golds}
    other = [q.task for q in everything if given_away_by(q.task) not in trained_on]
    validation = other[::2]
    made = warm_questions(golds, validation, seed=0)
    assert 0 < len(made) < len(everything)
    assert not {given_away_by(q.task) for q in made} & {given_away_by(t) for t in validation}


def own_recipe(tmp_path: Path, rows: str, *overrides: str) -> Recipe:
    """The tiny model's recipe over the company and a file of such rows."""
    database, questions = tmp_path / "company.sqlite", tmp_path / "q.csv"
    if not database.exists():
        make_database(database)
    questions.write_text(rows, encoding="utf-8")
    named = Named(db=str(database), questions=str(questions), model=None)
    return load_recipe(TINY_RECIPE, (*named.overrides(), *overrides))


def rows_of_golds() -> str:
    lines = [f'{question},"{sql}"\n' for question, sql in GOLDS.items() if '"' not in sql]
    return "question,sql\n" + "".join(lines)


def test_made_questions_join_your_training_tasks_and_never_those_that_validate(
    tmp_path: Path,
) -> None:
    alone = choose_tasks(own_recipe(tmp_path, rows_of_golds(), "data.made=0"))
    training, validation = choose_tasks(own_recipe(tmp_path, rows_of_golds(), "data.made=100"))
    made = [task for task in training if task.split == MADE]
    assert [task for task in training if task.split != MADE] == alone[0]
    assert validation == alone[1]
    assert len(made) > 20
    assert len({task.id for task in (*training, *validation)}) == len(training) + len(validation)
    yours = {given_away_by(task) for part in alone for task in part}
    assert not yours & {given_away_by(task) for task in made}
    warm = {given_away_by(q.task) for q in warm_questions(training, validation, seed=0)}
    assert not warm & {given_away_by(task) for task in (*made, *validation)}


def test_a_warm_start_shows_the_prompts_that_training_shows(tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, rows_of_golds(), "prompt.max_schema_tokens=40")
    questions = warm_questions(*choose_tasks(recipe), seed=0)[::10]

    async def prompts() -> list[tuple[Message, ...]]:
        tokenizer = load_tokenizer(model_path(recipe))
        async with open_databases(recipe) as databases:
            env = make_env(recipe, databases, tokenizer)()
            return [tuple(await env.reset(question.task)) for question in questions]

    traces = asyncio.run(make_traces(recipe, questions, lambda *_: None)).traces
    assert [trace.messages for trace in traces] == asyncio.run(prompts())


def test_a_wrong_gold_is_named_before_the_warm_start(querl: Querl, tmp_path: Path) -> None:
    recipe = own_recipe(tmp_path, rows_of_golds() + "who?,SELECT nobody FROM nowhere\n")
    folder = tmp_path / "runs" / "run"
    named = ("--db", recipe.data.db, "--questions", recipe.data.questions)
    code, _, err = querl("train", *named, "--out", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "'who?', fails" in err
    assert "nowhere" in err
    assert not folder.parent.exists()


def test_a_schema_of_a_thousand_tables_is_ranked_and_cut_to_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "large.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        for number in range(NUM_TABLES):
            columns = ", ".join(f"c{number}_{i} TEXT" for i in range(10))
            connection.execute(f"CREATE TABLE t{number} (id INTEGER PRIMARY KEY, {columns})")
        connection.execute("CREATE TABLE parcel (id INTEGER PRIMARY KEY, weight REAL)")
        connection.commit()

    async def describe() -> tuple[str, float]:
        async with SqlitePool(1) as pool:
            schemas = DescribedSchemas(
                pool,
                style=SchemaStyle.COMPACT,
                values=ShownValues.NONE,
                max_tokens=300,
                count_tokens=lambda text: len(text) // 4,
            )
            first = Task(id="t", question="the weight of each parcel?", database=str(path))
            text = await schemas.describe(first)
            start = time.process_time()
            for number in range(10):
                await schemas.describe(replace(first, question=f"the weight of parcel {number}?"))
            return text, (time.process_time() - start) / 10

    text, seconds = asyncio.run(describe())
    assert "parcel(id int pk, weight real)" in text
    assert len(text) // 4 <= 300
    assert seconds < 1.0


def test_a_table_that_reads_the_same_is_counted_once_for_all_questions(tmp_path: Path) -> None:
    database = make_database(tmp_path / "company.sqlite")
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return len(text)

    async def describe(*questions: str) -> None:
        async with SqlitePool(1) as pool:
            schemas = DescribedSchemas(
                pool,
                style=SchemaStyle.COMPACT,
                values=ShownValues.MATCHED,
                max_tokens=1000,
                count_tokens=count,
            )
            for question in questions:
                task = Task(id=question, question=question, database=str(database))
                await schemas.describe(task)

    asyncio.run(describe("Who is it?", "Where is it?", "Where is Bob?"))
    assert len(counted) == len(set(counted)) == 3  # two tables, and the one that shows Bob


def test_a_model_answers_all_questions_of_another_file(querl: Querl, tmp_path: Path) -> None:
    database, questions = tmp_path / "company.sqlite", tmp_path / "others.csv"
    make_database(database)
    questions.write_text(rows_of_golds(), encoding="utf-8")
    summary = tmp_path / "summary.json"
    options = (f"data.db={database}", "--questions", questions, "--json", summary)
    assert querl("eval", TINY_RECIPE, *options)[0] == 0
    told = json.loads(summary.read_text())
    assert told["n"] == rows_of_golds().count("\n") - 1
    code, _, err = querl("eval", TINY_RECIPE, "--questions", questions)
    assert (code, err.count("\n")) == (2, 1)
    assert "data.db=FILE" in err


def test_a_run_s_folder_stands_for_its_recipe_and_the_model_it_made(
    querl: Querl, tmp_path: Path
) -> None:
    recipe = own_recipe(tmp_path, rows_of_golds(), "data.max_validation=1", "env.max_turn_tokens=8")
    run, json_file = tmp_path / "my run", tmp_path / "summary.json"
    run.mkdir()
    (run / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    best, last = (run / "checkpoints" / name / "model" for name in ("best", "last"))
    code, _, err = querl("eval", run)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no checkpoint best or last" in err
    shutil.copytree(TINY_FOLDER, last)
    assert recipe_of(run, None, ()) == (run / "recipe.toml", (f'model.path="{last}"',))
    shutil.copytree(TINY_FOLDER, best)
    assert recipe_of(run, None, ())[1] == (f'model.path="{best}"',)
    assert recipe_of(run, Kept.LAST, ("run.seed=1",))[1] == (f'model.path="{last}"', "run.seed=1")
    code, told, err = querl("eval", run, "--json", json_file)
    assert (code, json.loads(json_file.read_text())["n"]) == (0, 1), err
    assert "note:" not in told
    code, told, _ = querl("eval", run / "recipe.toml")
    assert code == 0
    assert f"note: this is the model that the run began with; for its result name {run}" in told


def test_a_folder_that_is_no_run_is_named(querl: Querl, tmp_path: Path) -> None:
    code, _, err = querl("eval", tmp_path)
    assert (code, err) == (2, f"querl: {tmp_path} is no run's folder: it holds no recipe.toml\n")
    code, _, err = querl("eval", TINY_RECIPE, "--checkpoint", "last")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(("before", "told"), [(0.5, "no better than the 50.0% before"), (0.25, "")])
def test_a_best_checkpoint_that_is_no_better_than_the_start_is_told(
    before: float, told: str
) -> None:
    where, worth, again = about_the_model(Path("runs/my shop"), 8, 0.5, before=before)
    assert where.endswith("runs/my shop/checkpoints/best/model")
    assert "after 8 steps: 50.0%" in worth
    assert worth.endswith(told or "50.0%")
    assert shlex.split(again.partition("querl eval ")[2]) == ["runs/my shop"]
