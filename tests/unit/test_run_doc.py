"""docs/run.md names every number that a run writes, and all that a resumed run may change."""

from __future__ import annotations

import re
from pathlib import Path

from querl.algorithm.sample import LeftOut
from querl.run_check import MAY_CHANGE

ROOT = Path(__file__).parents[2]
ROOMS = "rollout|groups|policy|sampler|probe|engine|optimizer|tokens|speed|time|sft"
WRITTEN = re.compile(rf'"((?:{ROOMS})/[a-z_]+)"')
TIMED = re.compile(r'metrics\.time\("([a-z_]+)"\)')
NO_NUMBER = {"tokens/s"}  # a unit


def written() -> set[str]:
    """Names of numbers in the code; those that have a variable part are spelt out."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "querl").rglob("*.py")]
    named = {name for text in sources for name in WRITTEN.findall(text)} - NO_NUMBER
    timed = {f"time/{phase}_s" for text in sources for phase in TIMED.findall(text)}
    return named | timed | {f"left_out/{reason}" for reason in LeftOut}


def told() -> set[str]:
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    return set(re.findall(rf"`((?:{ROOMS}|left_out)/[a-z_]+)`", page))


def test_the_page_names_every_number_and_no_other() -> None:
    assert told() == written()


def test_the_page_names_what_a_resumed_run_may_change() -> None:
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    passage = page.partition("The same command resumes")[2].partition("\n\n")[0]
    named = {name.rpartition(".")[2] for name in re.findall(r"`([a-z_.]+)`", passage)}
    assert named == {key for _, key in MAY_CHANGE} | {"num_steps"}
