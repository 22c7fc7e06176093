"""``querl data synth``: questions with gold SQL for a database that has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from querl.cli.paths import new_file
from querl.cli.progress import progress
from querl.data.own import Made, check_written, make_questions, write_questions
from querl.data.rephrase import Endpoint, rephrase
from querl.errors import ConfigError
from querl.eval.report import facts_table
from querl.sql.databases import DatabaseKind, database_kind, name_to_show

SHOWN_QUESTIONS = 8


def synth(
    db: Annotated[str, typer.Option(help="Your SQLite database.")],
    out: Annotated[Path, typer.Option(help="The new file to write: .jsonl or .csv.")] = Path(
        "questions.jsonl"
    ),
    num: Annotated[int, typer.Option(min=1, help="How many questions, at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Another seed gives other questions.")] = 0,
    rephrase_url: Annotated[
        str | None,
        typer.Option("--rephrase", help="An OpenAI-compatible endpoint, such as http://host/v1."),
    ] = None,
    rephrase_model: Annotated[
        str | None, typer.Option(help="The endpoint's model (with --rephrase).")
    ] = None,
) -> None:
    """Make questions over a database, each executed, spread over kinds and levels.

    Example: querl data synth --db shop.sqlite --out questions.jsonl --num 200
    """
    check_written(new_file(out))
    if database_kind(db) is not DatabaseKind.SQLITE:
        raise ConfigError(
            f"--db {name_to_show(db)}: questions are made from a SQLite file; for another "
            "database, write some (docs/own-database.md says how)"
        )
    endpoint = _endpoint(rephrase_url, rephrase_model)
    console = Console(highlight=False)
    made = make_questions(Path(db), num=num, seed=seed)
    facts = _facts(made, num)
    if endpoint is not None:
        with progress(console, "rephrasing") as show:
            told = rephrase(made.tasks, endpoint, lambda done: show(done, len(made.tasks)))
        made = replace(made, tasks=told.tasks)
        facts["rephrased"] = (
            f"{told.num_kept:,}; others lost a value or a number, or said nothing new"
        )
        if told.fault is not None:
            facts["got no answer"] = f"{told.num_unanswered:,}, left as they are: {told.fault}"
    write_questions(out, made.tasks)
    console.print(facts_table(str(out), facts))
    for task in made.tasks[:: max(len(made.tasks) // SHOWN_QUESTIONS, 1)][:SHOWN_QUESTIONS]:
        console.print()
        console.print(task.question, markup=False, soft_wrap=True)
        console.print(task.gold_sql, markup=False, style="cyan", soft_wrap=True)
    console.print(f"\nto train on them: querl train --db {db} --questions {out}", soft_wrap=True)


def _endpoint(url: str | None, model: str | None) -> Endpoint | None:
    if (url is None) != (model is None):
        raise ConfigError("--rephrase and --rephrase-model go together: name both, or neither")
    return Endpoint(url, model) if url is not None and model is not None else None


def _facts(made: Made, num: int) -> dict[str, str]:
    few = "" if len(made.tasks) == num else f" of {num:,} wanted: the database has no more"
    return {
        "questions": f"{len(made.tasks):,}{few}",
        "out of": f"{made.num_drawn:,} different ones with an answer, {made.num_tried:,} tried",
        "levels": _told(made.by_hardness()),
        "kinds": _told(made.by_kind()),
    }


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
