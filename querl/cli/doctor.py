"""``querl doctor``: what this machine can run, and what to install for more."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sqlite3
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from querl.cli.paths import Overrides
from querl.config import Recipe, load_recipe
from querl.errors import ModelError
from querl.sql.databases import DRIVERS, DatabaseKind

if TYPE_CHECKING:
    from querl.launch.needs import Needs

CORE = (
    *("torch", "transformers", "peft", "safetensors", "numpy", "sqlglot", "pyarrow", "pydantic"),
    *("typer", "rich"),
)
EXTRAS = {
    "vllm": ("vllm", "samples by a vLLM server that querl starts"),
    "sglang": ("sglang", "samples by an SGLang server that querl starts"),
    "openai": ("aiohttp", "asks servers elsewhere"),
    "qlora": ("bitsandbytes", "trains on weights in 4 bits, and keeps AdamW's state in 8"),
    "gguf": ("gguf", "reads quantised .gguf model files"),
    "duckdb": (DRIVERS[DatabaseKind.DUCKDB], "runs queries on DuckDB files"),
    "postgres": (DRIVERS[DatabaseKind.POSTGRES], "runs queries on PostgreSQL servers"),
    "mysql": (DRIVERS[DatabaseKind.MYSQL], "runs queries on MySQL and MariaDB servers"),
    "tensorboard": ("tensorboard", "shows a run's numbers"),
    "wandb": ("wandb", "shows a run's numbers"),
}
GIB = 2**30


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe to check against this machine.")
    ] = None,
    overrides: Overrides = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Start this engine (hf, vllm, sglang) and hold it to its contract."),
    ] = None,
) -> None:
    """Look at this machine; with a recipe, say what is missing to run it.

    Exit code 0: ready; 1: something is missing here, or the engine breaks a promise; 2: the recipe
    is broken.

    Example: querl doctor recipes/demo.toml

    Example: querl doctor --engine vllm
    """
    if engine is not None:
        _check_engine(Console(highlight=False), recipe, engine, overrides or ())
        return
    console = Console(highlight=False)
    settings = load_recipe(recipe, tuple(overrides or ())) if recipe is not None else None
    console.print(_machine())
    missing = _missing_packages()
    if settings is not None:
        missing += _check(console, settings)
    for problem in missing:
        console.print(f"missing: {problem}", markup=False, soft_wrap=True)
    console.print("ready" if not missing else f"{len(missing)} missing")
    if missing:
        raise typer.Exit(1)


def _check_engine(
    console: Console, recipe: Path | None, kind: str, overrides: Sequence[str]
) -> None:
    """A line a promise. Exits with 1 where one is broken."""
    settings = load_recipe(recipe, (f"engine.kind={kind}", *overrides))
    wrong, right = ("colocated", "shared") if kind == "hf" else ("shared", "colocated")
    if settings.engine.placement == wrong:  # which belongs to the recipe's own engine
        chosen = (f"engine.kind={kind}", f"engine.placement={right}")
        settings = load_recipe(recipe, (*overrides, *chosen))
    settings.check_training()
    from querl.launch.engine_check import check_engine

    async def go() -> int:
        num_broken = 0
        async for finding in check_engine(settings):
            num_broken += not finding.is_kept
            word = "kept  " if finding.is_kept else "BROKEN"
            line = f"{word}  {finding.promise}: {finding.seen}"
            console.print(line, markup=False, soft_wrap=True)
        return num_broken

    if asyncio.run(go()):
        raise typer.Exit(1)


def _machine() -> Table:
    import torch

    table = Table.grid(padding=(0, 2))
    table.add_row("python", sys.version.split()[0])
    table.add_row("sqlite", sqlite3.sqlite_version)
    for name in CORE:
        table.add_row(name, _version(name))
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("memory", f"{_memory_bytes() / GIB:.0f} GiB")
    table.add_row("free disk", f"{shutil.disk_usage('.').free / GIB:.0f} GiB here")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            table.add_row(f"gpu {number}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB")
    else:
        table.add_row("gpu", "none: models up to a few million parameters train on the CPU")
    for extra, (module, use) in EXTRAS.items():
        here = importlib.util.find_spec(module) is not None
        table.add_row(
            f"extra {extra}",
            "installed" if here else escape(f"pip install 'querl[{extra}]': {use}"),
        )
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _missing_packages() -> list[str]:
    return [f"{name}: pip install {name}" for name in CORE if _version(name) == "missing"]


def _memory_bytes() -> int:
    """Physical memory; SC_PHYS_PAGES exists on Linux and macOS."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check(console: Console, recipe: Recipe) -> list[str]:
    """Print what the recipe takes; what is missing for it, a line each."""
    from querl.launch.memory import with_rows
    from querl.launch.needs import beyond_positions, missing, needs

    problems = list(missing(recipe))
    if recipe.engine.kind == "openai":
        console.print("the model: at an endpoint; it takes nothing here", markup=False)
        return problems
    try:
        taken = needs(with_rows(recipe))
        if taken is None:
            console.print(f"the model: what {recipe.model.path} takes is known once it is here")
        else:
            console.print(_table(taken))
            problems += _too_small(taken)
        history = _history(recipe)
    except ModelError as error:
        return [*problems, *([] if str(error) in problems else [str(error)])]
    console.print(history, markup=False, soft_wrap=True)
    if (warning := beyond_positions(recipe)) is not None:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    return problems


def _table(taken: Needs) -> Table:
    """Bytes by part, as ``querl.trainer.plan`` has them."""
    table = Table.grid(padding=(0, 2))
    where = "on the CPU"
    if taken.num_gpus:
        where = f"on each of {taken.num_gpus * taken.num_nodes} GPU(s)"
    table.add_row("the model", f"{taken.shape.num_parameters / 1e6:,.1f}M parameters; {where}:")
    for part, size in taken.plan.lines():
        table.add_row(f"  {part}", _gib(size))
    if taken.is_gpu_assumed:
        table.add_row("  of a GPU", f"{_gib(taken.gpu_bytes)}, assumed: none is here")
    table.add_row("  while updating", _gib(taken.plan.while_updating))
    table.add_row("  while sampling", _gib(taken.plan.while_sampling))
    beside = "" if taken.plan.is_beside else ": update and sampling take turns"
    table.add_row("  at most", f"{_gib(taken.plan.peak)}{beside}")
    table.add_row("host memory", _gib(taken.host))
    table.add_row("disk", f"checkpoints {_gib(taken.disk)}, the model {_gib(taken.model_on_disk)}")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"


def _too_small(taken: Needs) -> list[str]:
    """Memory and disk of this machine that the run does not fit in."""
    problems = []
    if taken.num_gpus and not taken.is_gpu_assumed and taken.plan.peak > taken.gpu_bytes:
        problems.append(
            f"GPU memory: {_gib(taken.plan.peak)} of {_gib(taken.gpu_bytes)}: set "
            f"{_less_memory(taken)}"
        )
    if taken.host > _memory_bytes():
        problems.append(f"memory: {_gib(taken.host)} of {_gib(_memory_bytes())} here")
    free = shutil.disk_usage(".").free
    if taken.disk > free:
        problems.append(
            f"disk: {_gib(taken.disk)} of checkpoints, {_gib(free)} free here: set fewer "
            "run.keep_checkpoints, or --out on a larger disk"
        )
    return problems


def _less_memory(taken: Needs) -> str:
    """What makes the part of a step that does not fit a GPU smaller."""
    if taken.plan.while_updating > taken.gpu_bytes:
        return "memory.checkpoint_activations, or fewer memory.tokens_per_microbatch"
    if not taken.plan.engine_weights:  # it samples with the learner's own
        return "a smaller engine.max_batch"
    return f"{'' if taken.plan.leaves else 'learner.offload=all, or '}a smaller engine.memory_share"


def _history(recipe: Recipe) -> str:
    """How turns become samples. Raises ModelError for a template that the history cannot use."""
    from querl.launch.local import make_history, model_path
    from querl.trainer.model import load_tokenizer

    path = model_path(recipe)
    kind = recipe.env.history
    if not path.exists() or (path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None):
        return (
            f"the history: whether {kind} fits the model's chat template is known once it is here"
        )
    if make_history(recipe, load_tokenizer(path)).is_append_only:
        return f"the history: {kind}; prompts only grow, so a trajectory is one sample"
    return (
        f"the history: {kind}; each prompt is rendered anew without earlier thoughts, so a turn is "
        "a sample of its own"
    )
