"""``querl score``: how many predicted queries give what the gold queries give."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from querl.cli.paths import file_to_be
from querl.cli.progress import counter, progress
from querl.data.audit import is_unstable
from querl.data.registry import load_tasks
from querl.errors import ConfigError, DataError
from querl.eval import bird, report
from querl.eval.predictions import read_predictions
from querl.eval.score import DatabaseFolders, Scored, summarise
from querl.eval.score import score as score_predictions
from querl.sql.compare import CompareMode
from querl.sql.databases import DatabasesByKind
from querl.sql.judge import Suite
from querl.sql.suite import load_suite
from querl.types import Outcome, Task

_MAX_GOLDS_NAMED = 20


def score(
    predictions: Annotated[
        Path, typer.Argument(help="One SQL a line (or SQL, tab, db_id), or JSONL with sql, index.")
    ],
    data: Annotated[
        str, typer.Option(help="spider:FOLDER, bird:FOLDER, demo, or module:function.")
    ],
    split: Annotated[str, typer.Option(help="The questions that were answered.")] = "dev",
    judge: Annotated[
        CompareMode, typer.Option(help="Whose rules say that two results are equal.")
    ] = CompareMode.SPIDER,
    keep_distinct: Annotated[
        bool, typer.Option("--keep-distinct", help="Judge spider: leave DISTINCT in both queries.")
    ] = False,
    databases: Annotated[
        Path | None, typer.Option(help="Suite databases, FOLDER/db_id/*.sqlite, for ts.")
    ] = None,
    suite: Annotated[
        Path | None, typer.Option(help="A folder made by querl suite build, for ts.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary here.")] = None,
    details: Annotated[Path | None, typer.Option(help="Write a JSON line a question here.")] = None,
) -> None:
    """Score predicted SQL by executing it: accuracy with 95 % intervals, by hardness and verdict.

    Example: querl score predictions.sql --data spider:../shared/spider --split dev
    """
    file_to_be("--json", json)
    file_to_be("--details", details)
    chosen = _choose_suite(databases, suite)
    tasks = load_tasks(data, split)
    if suite is not None and chosen is not None and not any(map(chosen.databases, tasks)):
        raise DataError(f"--suite {suite} knows none of the questions: build it for this data")
    predicted = read_predictions(predictions, tasks)
    scored, of_bird = asyncio.run(
        _score(tasks, predicted, judge, keep_distinct=keep_distinct, suite=chosen)
    )
    unstable = _unstable_golds(scored, judge, keep_distinct=keep_distinct)
    summary = summarise(scored) | of_bird
    summary |= {
        "judge": judge.value,
        "unstable_golds": unstable,
    }
    if details is not None:
        report.write_jsonl(details, [one.to_json() for one in scored])
    if json is not None:
        report.write_json(json, summary)
    _print(summary, tasks)


def _choose_suite(databases: Path | None, suite: Path | None) -> Suite | None:
    if databases is not None and suite is not None:
        raise ConfigError("--databases and --suite both name the databases for ts: give one")
    if databases is not None:
        if not databases.is_dir():
            raise DataError(f"--databases {databases} is no folder: name the one above the db_ids")
        return DatabaseFolders(databases)
    return load_suite(suite) if suite is not None else None


async def _score(
    tasks: Sequence[Task],
    predicted: Sequence[str],
    mode: CompareMode,
    *,
    keep_distinct: bool,
    suite: Suite | None,
) -> tuple[list[Scored], dict[str, Any]]:
    """The judged predictions, and BIRD's numbers where it is the judge."""
    async with DatabasesByKind() as databases:
        with progress(Console(stderr=True), "questions") as show:
            scored = await score_predictions(
                tasks,
                predicted,
                databases,
                mode=mode,
                keep_distinct=keep_distinct,
                suite=suite,
                on_done=counter(show, len(tasks)),
            )
        if mode is not CompareMode.BIRD:
            return scored, {}
        with progress(Console(stderr=True), "right answers timed") as show:
            ratios = await bird.time_ratios(scored, databases, counter(show, len(tasks)))
    return scored, bird.summarise_bird(scored, ratios)


def _unstable_golds(
    scored: Sequence[Scored], mode: CompareMode, *, keep_distinct: bool
) -> list[int]:
    unstable = []
    with progress(Console(stderr=True), "gold queries checked") as show:
        for one in scored:
            gold = one.judgement.gold  # what ended in the sandbox is not run outside of it
            runs = gold is not None and gold.outcome is Outcome.ROWS
            if runs and is_unstable(one.task, mode, keep_distinct=keep_distinct):
                unstable.append(one.index)
            show(one.index + 1, len(scored))
    return unstable


def _print(summary: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    console = Console(highlight=False)
    shares = summary["shares"]
    facts = {
        "execution accuracy": f"{report.percent(summary['ex'])} of {summary['n']:,}",
        "95 % over questions": report.percent_interval(summary["ex_interval"]),
        "95 % over databases": report.percent_interval(summary["ex_interval_databases"]),
        "test-suite accuracy": report.percent(summary["ts"]),
        "runs": report.percent(shares["runs"]),
        "over budget": report.percent(shares["over_budget"]),
        "no rows": report.percent(shares["empty"]),
        "no rows in gold": report.percent(shares["gold_empty"]),
        "verdicts": ", ".join(f"{name} {n:,}" for name, n in summary["verdicts"].items()),
    }
    if summary["ts"] is not None:
        facts["test-suite accuracy"] += f" of {summary['ts_n']:,}"
    if summary["failing_suite_golds"]:
        facts["golds that fail on the suite"] = f"{summary['failing_suite_golds']:,}"
    if summary["ts_interval"] is not None:
        facts["95 % (test suite)"] = report.percent_interval(summary["ts_interval"])
    if "soft_f1" in summary:
        facts |= {
            "soft F1": report.percent(summary["soft_f1"]),
            "R-VES (a timing)": f"{100 * summary['r_ves']:.1f}",
        }
    console.print(report.facts_table(f"judge {summary['judge']}", facts))
    levels = {level: (row["n"], row["ex"]) for level, row in summary["by_hardness"].items()}
    console.print(report.groups_table("by hardness", levels))
    if "by_difficulty" in summary:
        levels = {level: (row["n"], row["ex"]) for level, row in summary["by_difficulty"].items()}
        console.print(report.groups_table("by difficulty", levels))
    for kind in ("failing", "unstable"):
        indices = summary[f"{kind}_golds"]
        names = ", ".join(tasks[index].id for index in indices[:_MAX_GOLDS_NAMED])
        more = ", ... (all in --json)" if len(indices) > _MAX_GOLDS_NAMED else ""
        console.print(f"{kind} gold queries: {len(indices)}  {names}{more}", soft_wrap=True)
    for fault in summary["bad_databases"]:
        console.print(f"not judged: {fault}", soft_wrap=True)
