"""The documents name only settings, commands and files that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from querl.cli.app import app
from querl.config import Recipe, known_keys

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]
KEY = re.compile(rf"`((?:{'|'.join(Recipe.model_fields)})\.[a-z_0-9]+)(?=[`= ])")
LINK = re.compile(r"\]\((?!http)([^)#]+)")
COMMAND = re.compile(r"^ {4}(querl [^\n]+)", re.MULTILINE)
FILES = {".py", ".md", ".toml", ".json", ".jsonl", ".sql", ".sqlite"}


def each_page(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=each_page)
def test_settings_that_a_page_names_are_there(page: Path) -> None:
    named = set(KEY.findall(page.read_text(encoding="utf-8")))
    assert {key for key in named if Path(key).suffix not in FILES} <= set(known_keys())


@pytest.mark.parametrize("page", PAGES, ids=each_page)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def commands(page: Path) -> list[str]:
    """The page's own lines, continued ones whole, without remarks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.partition(" #")[0].partition(";")[0] for line in COMMAND.findall(text)]


def parse(command: str) -> None:
    """Read a command line as the program would, down to its last word, and do nothing."""
    words = shlex.split(command)[1:]
    found: Any = typer.main.get_command(app)
    context = click.Context(found, info_name="querl")
    while hasattr(found, "resolve_command"):
        name, found, words = found.resolve_command(context, words)
        context = click.Context(found, parent=context, info_name=name)
    found.parse_args(context, list(words))
    for key in (word.partition("=")[0] for word in words if re.match(r"[a-z]+\.[a-z_]+=", word)):
        assert key in known_keys(), f"{command}: {key}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=each_page)
def test_commands_of_a_page_are_read_by_the_program(page: Path) -> None:
    for command in commands(page):
        parse(command)


def test_a_command_that_does_not_exist_would_be_found() -> None:
    for command in ("querl score --suits x", "querl data shows", "querl sql"):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parse(command)
    with pytest.raises(AssertionError, match=r"run\.sede"):
        parse("querl train recipes/demo.toml run.sede=1")
