"""Seconds to read Spider train and to make its 7,000 prompts with matched values.

    python benchmarks/prepare_spider.py FOLDER      # the folder that holds spider/
    python benchmarks/prepare_spider.py FOLDER prompt.max_schema_tokens=900 model.path=MODEL

Prompts are those of the defaults (style short, values matched, two SQL workers, the packaged
tokenizer), with what follows the folder changed. Printed is each pass; the first may pay for
reading the databases from disk.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from time import perf_counter

from querl.config import Recipe, load_recipe
from querl.data.registry import load_tasks
from querl.launch.local import make_env, make_history, model_path, open_databases
from querl.trainer.model import load_tokenizer
from querl.types import Task

NUM_PASSES = 3


async def make_prompts(recipe: Recipe, tasks: list[Task]) -> int:
    """All prompts, as ids; how many tokens they have."""
    tokenizer = load_tokenizer(model_path(recipe))
    history = make_history(recipe, tokenizer)
    num_tokens = 0
    async with open_databases(recipe) as databases:
        new_env = make_env(recipe, databases, tokenizer)
        for task in tasks:
            num_tokens += len(history.start(await new_env().reset(task)))
    return num_tokens


def main() -> None:
    """Time the passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings: section.key=value")
    args = parser.parse_args()
    folder, recipe = args.folder / "spider", load_recipe(None, tuple(args.overrides))
    print("| pass | tasks | read, s | prompts, s | together, s | tokens |")
    print("|---|---|---|---|---|---|")
    for number in range(1, NUM_PASSES + 1):
        start = perf_counter()
        tasks = load_tasks(f"spider:{folder}", "train")
        read = perf_counter()
        num_tokens = asyncio.run(make_prompts(recipe, tasks))
        end = perf_counter()
        print(
            f"| {number} | {len(tasks):,} | {read - start:.1f} | {end - read:.1f} | "
            f"{end - start:.1f} | {num_tokens:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
