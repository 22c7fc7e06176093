"""What choosing tables of a large schema costs a question.

    python benchmarks/large_schema.py FOLDER [TABLES]     # FOLDER/large.sqlite is made, and removed

Each table has 11 columns and 5 rows. The first question reads the schema, and with
``prompt.values = "matched"`` the stored texts; the others choose what of it is shown. Seconds are
those of this process, which chooses; the worker that reads the database runs beside it.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import statistics
import sys
from contextlib import closing
from pathlib import Path
from time import process_time

from querl.config import load_recipe
from querl.launch.local import TINY_FOLDER, make_env, open_databases
from querl.trainer.model import load_tokenizer
from querl.types import Task

WORDS = ("order", "customer", "product", "price", "city", "name", "date", "team", "player", "song")
NUM_QUESTIONS = 100


def make(path: Path, num_tables: int) -> None:
    """Write the database."""
    rng = random.Random(0)
    with closing(sqlite3.connect(path)) as connection:
        for number in range(num_tables):
            table = f"{rng.choice(WORDS)}_{number}"
            columns = ", ".join(f"{rng.choice(WORDS)}_{n} TEXT" for n in range(10))
            connection.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {columns})")
            rows = [
                (n, *(f"{rng.choice(WORDS)} {rng.randrange(99)}" for _ in range(10)))
                for n in range(5)
            ]
            connection.executemany(f"INSERT INTO {table} VALUES (?{', ?' * 10})", rows)
        connection.commit()


async def measure(path: Path, values: str) -> tuple[float, float]:
    """CPU seconds of the first prompt, and the median of the others'."""
    rng = random.Random(1)
    recipe = load_recipe(Path("querl/data/recipes/own-tiny.toml"), (f'prompt.values="{values}"',))
    tokenizer = load_tokenizer(TINY_FOLDER)
    seconds = []
    async with open_databases(recipe) as databases:
        make_one = make_env(recipe, databases, tokenizer)
        for number in range(NUM_QUESTIONS):
            asked = " and ".join(f"{rng.choice(WORDS)} {rng.randrange(99)}" for _ in range(3))
            task = Task(id=str(number), question=f"Which have {asked}?", database=str(path))
            start = process_time()
            await make_one().reset(task)
            seconds.append(process_time() - start)
    return seconds[0], statistics.median(seconds[1:])


def main(folder: Path, num_tables: int) -> None:
    """Print a line for each choice of values."""
    path = folder / "large.sqlite"
    make(path, num_tables)
    for values in ("none", "matched"):
        first, other = asyncio.run(measure(path, values))
        print(f"{values}: first {first:.2f} s, then {other * 1000:.0f} ms a question")
    path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
