"""Spider's layout, the table of data sources, and the split by database."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from querl.data.registry import hold_out_databases, load_tasks
from querl.data.spider import load
from querl.errors import ConfigError, DataError
from querl.types import Task


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "database" / "shop"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "shop.sqlite")) as connection:
        connection.execute("CREATE TABLE item (name TEXT)")
        connection.commit()
    return tmp_path


def write(root: Path, name: str, *rows: dict[str, object]) -> None:
    (root / name).write_text(json.dumps(rows))


ROW: dict[str, object] = {"question": "Which?", "query": "SELECT name FROM item", "db_id": "shop"}


def test_spider_dev_is_read_whole(shared_data: Path) -> None:
    tasks = list(load(shared_data / "spider", "dev"))
    assert len(tasks) == len({task.id for task in tasks}) == 1034
    assert len({task.db_id for task in tasks}) == 20
    assert tasks[7].id == "spider-dev-0007"
    assert all(Path(task.database).is_file() for task in tasks)


def test_train_others_reads_the_databases_that_have_rows(shared_data: Path) -> None:
    tasks = load_tasks(f"spider:{shared_data / 'spider'}", "train+others")
    assert len(tasks) == len({task.id for task in tasks}) == 8659
    assert {Path(task.database).parents[1].name for task in tasks[7000:]} == {"others_populated"}


def test_variants_of_spider_are_splits_of_their_own(root: Path) -> None:
    write(root, "spider-realistic.json", ROW)
    write(root, "syn.json", {"SpiderSynQuestion": "What?", "SpiderQuestion": "Which?", **ROW})
    (realistic,) = load(root, "spider-realistic")
    (synonyms,) = load(root, "syn")
    assert realistic.id == "spider-spider-realistic-0000"
    assert synonyms.question == "What?"


@pytest.mark.parametrize(
    ("split", "file"),
    [
        ("dk", "Spider-DK.json"),
        ("dk", "Spider-DK/Spider-DK.json"),
        ("syn", "Spider-Syn/dev.json"),
        ("syn-train", "Spider-Syn/train_spider.json"),
        ("realistic", "spider-realistic.json"),
        ("realistic", "spider-realistic/spider-realistic.json"),
    ],
)
def test_variants_are_found_by_their_published_names(root: Path, split: str, file: str) -> None:
    (root / file).parent.mkdir(exist_ok=True)
    write(root, file, ROW)
    (task,) = load(root, split)
    assert (task.id, task.split) == (f"spider-{split}-0000", split)


def test_dk_and_test_prefer_databases_of_their_own(root: Path) -> None:
    for folder in ("Spider-DK/database", "test_database"):
        shutil.copytree(root / "database", root / folder)
    for split, file in (("dk", "Spider-DK.json"), ("test", "test.json"), ("dev", "dev.json")):
        write(root, file, ROW)
        (task,) = load(root, split)
        place = Path(task.database).relative_to(root).parents[1].as_posix()
        assert place == {"dk": "Spider-DK/database", "test": "test_database"}.get(split, "database")


def test_a_missing_file_names_those_that_are_there(root: Path) -> None:
    write(root, "dev.json", ROW)
    with pytest.raises(DataError, match=r"test\.json does not exist; JSON files there: dev"):
        list(load(root, "test"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "db_id": "shopp"}, r"row 1 asks database 'shopp'.*nearest: 'shop'"),
        ({**ROW, "query": " "}, "row 1 has no text in field 'query'"),
        ({**ROW, "query": "DELETE FROM item"}, "row 1: a gold query is one SELECT.*'DELETE FROM"),
        ({"query": "SELECT 1", "db_id": "shop"}, "row 1 has no text in field .* 'question'"),
        ({**ROW, "question": "Which \ud83d?"}, "row 1, field 'question' holds half of a character"),
    ],
)
def test_a_wrong_row_is_named(root: Path, row: dict[str, object], message: str) -> None:
    write(root, "dev.json", ROW, row)
    with pytest.raises(DataError, match=message):
        list(load(root, "dev"))


def test_a_database_that_is_missing_is_looked_for_in_every_place(root: Path) -> None:
    write(root, "test.json", {**ROW, "db_id": "zoo"})
    with pytest.raises(DataError, match=r"/test_database/zoo/zoo.sqlite or .*/database/zoo/zoo"):
        list(load(root, "test"))


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", '["a"]', "[" * 100_000])
def test_a_damaged_file_is_a_data_error(root: Path, text: str) -> None:
    (root / "dev.json").write_text(text)
    with pytest.raises(DataError, match="fetch the file again"):
        list(load(root, "dev"))


def test_a_folder_in_the_place_of_a_file_is_a_data_error(root: Path) -> None:
    (root / "dev.json").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*dev\.json: Is a directory"):
        list(load(root, "dev"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "spyder",
            "data source 'spyder' is unknown: use demo, spider, bird, skyrl, omnisql, files or "
            "module:function",
        ),
        ("worlds:2", "'worlds:2' is for querl data traces alone: name another, such as demo"),
        ("no_such_module:load", "no module 'no_such_module'"),
        ("querl.types:load", "querl.types has no 'load'"),
    ],
)
def test_an_unknown_source_is_a_config_error(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tasks(source, "train")


def test_spider_without_a_folder_is_found_through_the_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUERL_DATA", raising=False)
    with pytest.raises(DataError, match="spider:FOLDER, or set QUERL_DATA"):
        load_tasks("spider", "dev")
    write(root, "dev.json", ROW)
    root.rename(root.parent / "spider")
    monkeypatch.setenv("QUERL_DATA", str(root.parent))
    assert len(load_tasks("spider", "dev")) == 1


def test_a_loader_of_your_own_is_called_with_folder_and_split(root: Path) -> None:
    write(root, "dev.json", ROW)
    assert load_tasks(f"querl.data.spider:load:{root}", "dev") == list(load(root, "dev"))


def test_two_tasks_of_one_id_are_refused(root: Path) -> None:
    write(root, "dev.json", ROW)
    with pytest.raises(DataError, match="has 2 tasks of id 'spider-dev-0000' in split 'dev\\+dev'"):
        load_tasks(f"spider:{root}", "dev+dev")


def test_held_out_databases_stay_held_out_when_tasks_are_added() -> None:
    tasks = [Task(id=str(n), question="q", database=f"d{n % 100}.sqlite") for n in range(300)]
    train, held_out = hold_out_databases(tasks, 0.2)
    assert {x.db_id for x in train}.isdisjoint(x.db_id for x in held_out)
    assert 10 <= len({x.db_id for x in held_out}) <= 30
    _, held_out_of_fewer = hold_out_databases(tasks[:50], 0.2)
    assert set(held_out_of_fewer) == set(held_out) & set(tasks[:50])
