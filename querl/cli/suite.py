"""``querl suite``: databases that tell a right query from a lucky one, made and checked."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from querl.cli.data import DataOption, DbOption, QuestionsOption, SplitOption, choose_tasks
from querl.cli.paths import file_to_be
from querl.cli.progress import progress
from querl.eval import report
from querl.sql.sqlite import SQLITE_VERSION
from querl.sql.suite import SuiteHead, load_suite


def build(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    data: DataOption = "demo",
    split: SplitOption = "train",
    databases_per_question: Annotated[
        int, typer.Option(min=1, max=24, help="How many databases a question has at most.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Same seed and data, same bytes.")] = 0,
    db: DbOption = None,
    questions: QuestionsOption = None,
) -> None:
    """Make a suite for the gold queries of a task set.

    Example: querl suite build --data spider:../shared/spider --split dev --out suites/spider-dev
    """
    from querl.suite.build import build_suite

    tasks = choose_tasks(data, split, db, questions)
    head = SuiteHead(
        seed=seed,
        databases_per_question=databases_per_question,
        sqlite=SQLITE_VERSION,
        sqlglot=version("sqlglot"),
        querl=version("querl"),
    )
    with progress(Console(stderr=True), "databases") as show:
        summary = build_suite(tasks, out, head, show)
    facts = {
        "gold queries": f"{summary.num_questions:,}",
        "without a database": f"{summary.num_without:,}",
        "skipped (they fail or cannot be read)": f"{summary.num_skipped:,}",
        "databases": f"{summary.num_databases:,}",
        "megabytes": f"{summary.num_bytes / 1e6:.1f}",
    }
    Console(highlight=False).print(report.facts_table(str(out), facts))


def check(
    folder: Annotated[Path, typer.Argument(help="A suite made by querl suite build.")],
    data: DataOption = "demo",
    split: SplitOption = "train",
    db: DbOption = None,
    questions: QuestionsOption = None,
    json: Annotated[Path | None, typer.Option(help="Write the counts here.")] = None,
) -> None:
    """Count the mutants that a suite kills, and the equal rewrites of golds that it rejects.

    Example: querl suite check suites/spider-dev --data spider:../shared/spider --split dev
    """
    from querl.suite.check import CHECKED_K, check_suite

    file_to_be("--json", json)
    suite = load_suite(folder)
    tasks = choose_tasks(data, split, db, questions)
    with progress(Console(stderr=True), "databases") as show:
        checked = check_suite(suite, tasks, show)
    if json is not None:
        report.write_json(json, checked.to_json())
    with_k = f"killed with {', '.join(map(str, CHECKED_K))} databases"
    facts = {
        "gold queries": f"{checked.num_golds:,}",
        "with a database": f"{checked.num_covered:,}",
        "mutants that some neighbour kills": f"{checked.num_mutants:,}",
        with_k: _shares([checked.killed[k] for k in CHECKED_K], checked.num_mutants),
        "mutants that their own database accepts": f"{checked.num_lucky:,}",
        f"of these, {with_k}": _shares(
            [checked.lucky_killed[k] for k in CHECKED_K], checked.num_lucky
        ),
        "equal rewrites of golds": f"{checked.num_rewrites:,}",
        "rejected": f"{len(checked.rejected):,}",
    }
    console = Console(highlight=False)
    console.print(report.facts_table(str(folder), facts))
    for db_id, what, sql in checked.rejected:
        console.print(f"rejected ({db_id}, {what}): {sql}", markup=False, soft_wrap=True)


def _shares(counts: Sequence[int], total: int) -> str:
    return ", ".join(report.percent(number / total if total else None) for number in counts)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.command("build")(build)
app.command("check")(check)
