"""``querl data traces``: what a warm start learns from, made and told in numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from querl.cli.paths import CheckpointOption, Overrides, folder_to_be, recipe_of, start_note
from querl.cli.progress import progress
from querl.config import load_recipe
from querl.errors import ConfigError
from querl.eval.report import facts_table, percent, write_json, write_jsonl


def traces(
    recipe: Annotated[
        Path, typer.Argument(help="A .toml file (data, prompt, episode, sft), or a run's folder.")
    ],
    overrides: Overrides = None,
    checkpoint: CheckpointOption = None,
    out: Annotated[
        Path, typer.Option(help="The file to write, JSON lines; its report goes beside it.")
    ] = Path("traces.jsonl"),
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let the recipe's model play each question so often, for traces of the kinds "
            "sampled and own_repair.",
        ),
    ] = 0,
    keep: Annotated[
        int, typer.Option(min=1, help="Traces a question, at most, of those two kinds.")
    ] = 1,
) -> None:
    """Make warm-start traces of a recipe's training tasks, each query executed for real.

    Example: querl data traces recipes/spider-smollm2.toml --out runs/traces.jsonl

    From a model's own episodes: querl data traces runs/demo --samples 4
    'sft.shares={sampled=0.5,own_repair=0.5}'
    """
    file, settled = recipe_of(recipe, checkpoint, overrides or ())
    settings = load_recipe(file, settled)
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: name a file that ends in .jsonl")
    folder_to_be(out.parent)
    if samples:
        settings.check_playing()
    console = Console(highlight=False)
    if samples and (note := start_note(recipe, settled)) is not None:
        console.print(note, markup=False, soft_wrap=True)
    from querl.data.traces import save_traces
    from querl.launch.traces import Asking, make_traces, training_questions

    asking = Asking(num_samples=samples, keep=keep) if samples else None
    questions = training_questions(settings)
    with progress(console, "traces") as show:
        made = asyncio.run(make_traces(settings, questions, show, asking))
    report = made.report()
    write_jsonl(out.with_suffix(".questions.jsonl"), made.question_lines())
    write_json(out.with_suffix(".report.json"), report)
    save_traces(out, made.traces)  # last, so that traces are never without their report
    console.print(_kinds_table(f"{out}: {report['traces']:,} traces", report["kinds"]))
    console.print(facts_table("", {k: v for k, v in _facts(report).items() if v}))


def _kinds_table(title: str, kinds: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("kind", "traces", "share", "asked", "questions drawn", "turns", "tokens"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for name, kind in kinds.items():
        table.add_row(
            name,
            f"{kind['traces']:,}",
            percent(kind["share_got"]),
            percent(kind["share_asked"]),
            f"{kind['questions_drawn']:,}",
            _mean(kind["mean_turns"], 2),
            _mean(kind["mean_tokens"], 0),
        )
    return table


def _mean(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _facts(report: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "questions": f"{report['questions']:,}",
        "got another kind": _counts(report["replaced"]),
        "left out": _counts(report["left_out"]),
        "queries executed": f"{report['queries_executed']:,}",
    }
    samples = report["samples"]
    if samples is None:
        return facts
    rates = (f"{k}: {percent(rate)}" for k, rate in samples["pass_at"].items())
    return facts | {
        "episodes of the model": f"{samples['episodes']:,}, {samples['a_question']} a question",
        "pass@k": "  ".join(rates),
        "questions all right": f"{samples['all_right']:,}",
        "questions never right": f"{samples['none_right']:,}",
        "turns, tokens": f"{samples['mean_turns']:.2f}, {samples['mean_tokens']:.0f} an episode",
        "verdicts": _counts(samples["verdicts"]),
    }


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
