"""``querl data``: look at a task set before anything is trained or scored on it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from querl.cli.get import get
from querl.cli.own import no_questions
from querl.cli.paths import file_to_be
from querl.cli.progress import counter, progress
from querl.cli.synth import synth
from querl.cli.traces import traces
from querl.config import Recipe
from querl.data import files, registry
from querl.data.audit import Audited, Fault, summarise
from querl.data.audit import audit as audit_golds
from querl.env.prompts import PromptStyle
from querl.errors import ConfigError
from querl.eval.report import facts_table, percent, write_json
from querl.sql.databases import DatabasesByKind
from querl.types import Message, Task

SHOWN_ERRORS = 3

DataOption = Annotated[
    str,
    typer.Option(
        help="demo, spider:FOLDER, bird:FOLDER, skyrl:FOLDER, omnisql:FOLDER, files:FOLDER, or "
        "module:function."
    ),
]
SplitOption = Annotated[str, typer.Option(help="Which part of the data: train, dev, ...")]
DbOption = Annotated[
    str | None,
    typer.Option(
        help="Your database: a file, a folder of them, or a server's URL (with --questions)."
    ),
]
QuestionsOption = Annotated[
    Path | None,
    typer.Option(
        help="Your questions: a csv, tsv, json, jsonl or parquet file with the columns "
        "question and sql (or answer)."
    ),
]


def choose_tasks(data: str, split: str, db: str | None, questions: Path | None) -> list[Task]:
    """The tasks of ``--db`` and ``--questions`` where they are given, else those of ``--data``."""
    if db is None and questions is None:
        return registry.load_tasks(data, split)
    if db is None:
        raise ConfigError(f"--db is missing: name the database that {questions} asks")
    if questions is None:
        raise no_questions(db)
    return files.load(db, questions, split)


def show(
    data: DataOption = "demo",
    split: SplitOption = "train",
    num: Annotated[int, typer.Option(min=1, help="How many tasks, evenly spread.")] = 3,
    db: DbOption = None,
    questions: QuestionsOption = None,
    style: Annotated[
        PromptStyle, typer.Option(help="prompt.style of the recipe.")
    ] = PromptStyle.SHORT,
    model: Annotated[
        str, typer.Option(help="Whose tokens are counted: a model's folder, or tiny.")
    ] = "tiny",
) -> None:
    """Count the tasks of a data set and print a few, as a model will see them.

    Example: querl data show --data spider:../shared/spider --split dev --num 5 --style full
    """
    tasks = choose_tasks(data, split, db, questions)
    console = Console(highlight=False)
    facts = {
        "tasks": f"{len(tasks):,}",
        "databases": f"{len({task.database for task in tasks}):,}",
        "difficulty": _counts(task.difficulty for task in tasks),
        "kinds": _counts(task.kind for task in tasks),
    }
    title = str(questions) if questions else f"{data}, {split}"
    console.print(facts_table(title, {name: value for name, value in facts.items() if value}))
    few = tasks[:: max(len(tasks) // num, 1)][:num]
    # a first prompt is the same in all histories, and this one serves every template
    env = {"history": "stepwise"}
    recipe = Recipe.model_validate(
        {"model": {"path": model}, "prompt": {"style": style}, "env": env}
    )
    for task, (messages, num_tokens) in zip(few, asyncio.run(_prompts(few, recipe)), strict=True):
        console.print()
        console.print(
            f"[bold]{task.id}[/bold]  {task.db_id}  {task.difficulty or ''}  {num_tokens:,} tokens"
        )
        for message in messages:
            console.print(f"{message['role']}:", style="bold dim")
            console.print(message["content"], markup=False, soft_wrap=True)
        console.print("gold:" if task.gold_sql else "expected rows:", style="bold dim")
        console.print(_gold(task), markup=False, style="cyan", soft_wrap=True)


def _gold(task: Task) -> str:
    """The gold query, or the expected rows, a JSON list a line."""
    if task.gold_sql is not None:
        return task.gold_sql
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in task.answer or ())


async def _prompts(tasks: Sequence[Task], recipe: Recipe) -> list[tuple[tuple[Message, ...], int]]:
    """The first messages of each task, and how many tokens the model reads for them."""
    from querl.launch.local import make_env, make_history, model_path, open_databases
    from querl.trainer.model import load_tokenizer

    tokenizer = load_tokenizer(model_path(recipe))
    history = make_history(recipe, tokenizer)
    shown = []
    async with open_databases(recipe) as databases:
        new_env = make_env(recipe, databases, tokenizer)
        for task in tasks:
            messages = await new_env().reset(task)
            shown.append((messages, len(history.start(messages))))
    return shown


def audit(
    data: DataOption = "demo",
    split: SplitOption = "train",
    db: DbOption = None,
    questions: QuestionsOption = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Write the table, all ids and the golds' errors here."),
    ] = None,
) -> None:
    """Find gold queries that fail, cost too much, say nothing, or hang on the order of rows.

    Example: querl data audit --data spider:../shared/spider --split train --json audit.json
    """
    file_to_be("--json", json_out)
    tasks = choose_tasks(data, split, db, questions)
    summary = summarise(asyncio.run(_audit(tasks)))
    if json_out is not None:
        write_json(json_out, summary)
    table = Table(title=f"{questions or f'{data}, {split}'}", title_justify="left")
    for column in ("gold is", "tasks", "share", "such as"):
        table.add_column(column, justify="right" if column in ("tasks", "share") else "left")
    for name, row in summary["faults"].items():
        table.add_row(name, f"{row['n']:,}", percent(row["share"]), ", ".join(row["tasks"][:2]))
    console = Console(highlight=False)
    console.print(table)
    for fault in Fault:
        if summary["faults"][fault]["n"]:
            console.print(f"{fault}: {fault.meaning}", soft_wrap=True)
    for task_id, error in islice(summary["errors"].items(), SHOWN_ERRORS):
        console.print(f"the gold of {task_id}: {error}", markup=False, soft_wrap=True)
    console.print(f"{summary['faultless']:,} of {summary['n']:,} tasks have a gold without fault")
    for bad in summary["bad_databases"]:
        console.print(f"not audited: {bad}", soft_wrap=True)


async def _audit(tasks: Sequence[Task]) -> list[Audited]:
    with progress(Console(stderr=True), "gold queries checked") as show:
        async with DatabasesByKind() as databases:
            return await audit_golds(tasks, databases, on_done=counter(show, len(tasks)))


def _counts(labels: Iterable[str | None]) -> str:
    """``easy 3, hard 1``, in order of frequency; empty where no task has a label."""
    counts = Counter(label for label in labels if label is not None)
    return ", ".join(f"{label} {number:,}" for label, number in counts.most_common())


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.command("get")(get)
app.command("show")(show)
app.command("audit")(audit)
app.command("traces")(traces)
app.command("synth")(synth)
