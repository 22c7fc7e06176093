"""The command line as a user meets it: help, exit codes, and one line for each mistake."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from company import make_company
from console import Querl

from querl.cli.app import COMMANDS
from querl.cli.sql import EXIT_NO_ROWS
from querl.trainer.checkpoint import RunLock

REWRITING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}(cut){% else %}{{ m['content'] }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return make_company(tmp_path / "company")


def test_the_help_lists_every_command(querl: Querl) -> None:
    code, out, _ = querl("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        "data get",
        "data show",
        "data traces",
        "data audit",
        "data synth",
        "suite build",
        "suite check",
    ],
)
def test_every_command_has_help_with_an_example(querl: Querl, command: str) -> None:
    code, out, _ = querl(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out
    if command not in ("data", "suite"):  # groups: their commands have examples
        assert "Example: querl" in out


def test_an_unknown_command_is_exit_code_2(querl: Querl) -> None:
    assert querl("trian")[0] == 2


def test_sql_ends_with_0_for_rows_3_for_none_and_2_for_no_database(
    querl: Querl, company: Path
) -> None:
    database = company / "company.sqlite"
    code, out, _ = querl("sql", database, "SELECT count(*) AS heads FROM employee")
    assert (code, "heads" in out, "5" in out) == (0, True, True)
    code, _, err = querl("sql", database, "SELECT nonsense")
    assert (code, err.partition(":")[0]) == (EXIT_NO_ROWS, "sql_error")
    assert EXIT_NO_ROWS == 3
    assert_refused(querl("sql", company / "no.sqlite", "SELECT 1"), "no.sqlite")


def assert_refused(ended: tuple[int, str, str], *named: str) -> None:
    code, _, err = ended
    assert code == 2, err
    assert err.startswith("querl: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert all(name in err for name in named), err


def assert_training_refused(
    querl: Querl, company: Path, *overrides: str, named: tuple[str, ...]
) -> None:
    """Refused before anything is written, even with --fresh over an earlier run."""
    out = company.parent / "run"
    recipe = company / "recipe.toml"
    assert_refused(querl("train", recipe, *overrides, "--out", out, "--fresh"), *named)
    assert not out.exists()


def test_an_unknown_recipe_key_is_refused_with_the_nearest_name(
    querl: Querl, company: Path
) -> None:
    assert_training_refused(
        querl, company, "run.num_stepz=3", named=("run.num_stepz", "run.num_steps")
    )


def test_a_missing_recipe_is_refused(querl: Querl, tmp_path: Path) -> None:
    assert_refused(querl("train", tmp_path / "no.toml", "--out", tmp_path / "run"), "no.toml")
    assert not (tmp_path / "run").exists()


def own_data(company: Path, name: str, text: str, db: str = "company.sqlite") -> tuple[str, str]:
    (company / name).write_text(text, encoding="utf-8")
    return f"data.db={company / db}", f"data.questions={company / name}"


@pytest.mark.parametrize(
    ("name", "text", "db", "named"),
    [
        ("q.csv", "question,sql\nhow many?,SELECT 1\n", "no.sqlite", ("no.sqlite", "row 2")),
        ("q.csv", "question,sql\nhow many?,SELECT 1\n", "q.csv", ("no SQLite database",)),
        ("q.csv", "", "company.sqlite", ("q.csv", "no question")),
        ("q.csv", "question,sql\n", "company.sqlite", ("q.csv", "no question")),
        ("q.csv", "text,sql\na,SELECT 1\n", "company.sqlite", ("no column 'question'",)),
        ("q.csv", "question,x\na,b\n", "company.sqlite", ("no column 'sql'",)),
        ("q.csv", "question,sql\na,DROP TABLE b\n", "company.sqlite", ("row 2", "SELECT")),
        ("q.csv", "question,sql\na,SELECT b\nc,SELECT 1\n", "company.sqlite", ("no such column",)),
    ],
)
def test_your_own_data_is_refused_with_file_row_and_reason(
    querl: Querl, company: Path, name: str, text: str, db: str, named: tuple[str, ...]
) -> None:
    overrides = own_data(company, name, text, db)
    assert_training_refused(querl, company, *overrides, "data.validation=val", named=named)


def test_a_model_folder_without_a_tokenizer_is_refused(querl: Querl, company: Path) -> None:
    for path in (company / "model").glob("tokenizer*"):
        path.unlink()
    assert_training_refused(querl, company, named=("model", "tokenizer.json"))


def test_a_missing_model_is_refused(querl: Querl, company: Path) -> None:
    shutil.rmtree(company / "model")
    assert_training_refused(querl, company, named=(str(company / "model"),))


def test_a_chat_template_that_rewrites_history_is_refused(querl: Querl, company: Path) -> None:
    (company / "model" / "chat_template.jinja").write_text(REWRITING_TEMPLATE, encoding="utf-8")
    assert_training_refused(querl, company, named=("rewrites earlier turns",))


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
@pytest.mark.parametrize("below", [(), ("deeper",)])
def test_an_out_folder_that_is_a_file_is_refused(
    querl: Querl, company: Path, command: str, below: tuple[str, ...]
) -> None:
    file = company / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    ended = querl(command, company / "recipe.toml", "--out", file.joinpath(*below))
    assert_refused(ended, "notes.txt", "name a folder")
    assert file.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("option", ["--json", "--details"])
@pytest.mark.parametrize("command", ["eval", "score"])
def test_a_report_that_could_not_be_written_is_refused_before_the_work(
    querl: Querl, company: Path, command: str, option: str
) -> None:
    (company / "recipe.toml").write_text("[model]\npath = 'nowhere'", encoding="utf-8")
    named = {"eval": (company / "recipe.toml",), "score": (company / "none.sql", "--data", "demo")}
    words = (command, *named[command], option)
    assert_refused(querl(*words, company), f"{option} {company} is a folder", "name a file")
    assert_refused(querl(*words, company / "recipe.toml" / "x.json"), "recipe.toml is a file")


def test_what_was_evaluated_can_be_scored_question_by_question(
    querl: Querl, company: Path, tmp_path: Path
) -> None:
    details, told, scored = (tmp_path / name for name in ("details.jsonl", "eval.json", "ex.json"))
    recipe = company / "recipe.toml"
    code, out, err = querl("eval", recipe, "--details", details, "--json", told)
    assert code == 0, err
    lines = [json.loads(line) for line in details.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert "note: the model model reads" in out  # the limits of env are the defaults
    summary = json.loads(told.read_text(encoding="utf-8"))
    assert summary["accuracy"] == sum(line["right"] for line in lines) / 2
    assert (summary["judge"], summary["model"]) == ("strict", f"{company}/model")
    data = ("--data", f"files:{company}", "--split", "val", "--judge", "strict")
    code, _, err = querl("score", details, *data, "--json", scored)
    assert code == 0, err
    assert json.loads(scored.read_text(encoding="utf-8"))["ex"] == summary["accuracy"]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_folder_that_is_refused_is_so_before_the_model_is_loaded(
    querl: Querl, company: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last").symlink_to("step-000002")
    shutil.copy(company / "recipe.toml", out)
    shutil.rmtree(company / "model")
    words = (command, company / "recipe.toml", "optimizer.lr=0.5", "--out", out)
    assert_refused(querl(*words), "holds a run with optimizer.lr = 0.01, not 0.5", "--fresh")
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    assert_refused(querl(*words, "--fresh"), "'thesis.txt'", "name another --out")
    assert (out / "recipe.toml").exists()


def test_training_at_temperature_0_is_refused(querl: Querl, company: Path) -> None:
    assert_training_refused(querl, company, "engine.temperature=0", named=("temperature=0",))


def test_training_with_a_cut_tail_says_so_at_the_start(querl: Querl, company: Path) -> None:
    overrides = ("engine.top_p=0.9", "run.num_steps=1")
    code, out, _ = querl(
        "train", company / "recipe.toml", *overrides, "--out", company.parent / "run"
    )
    assert code == 0
    assert out.index("warning: engine.top_p=0.9") < out.index("step 1/1")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("algorithm.credit=grop", "'grop'"),
        ("algorithm.loss={name='clop'}", "'clop'"),
        ("algorithm.loss={low='wide'}", "algorithm.loss.low"),
        ("reward.parts={binari=1.0}", "'binari'"),
        ("reward.parts={'no_such_module:f'=1.0}", "no_such_module"),
        ("data.source=spidr", "'spidr'"),
    ],
)
def test_a_misspelt_name_is_refused(querl: Querl, company: Path, override: str, named: str) -> None:
    assert_training_refused(querl, company, override, named=(named,))


@pytest.mark.parametrize(
    "command", [("eval",), ("data", "traces", "--samples", "2")], ids=["eval", "traces"]
)
@pytest.mark.parametrize(
    "setting", ["engine.replicas=2", "engine.tensor_parallel=2", "engine.dtype=fp8"]
)
def test_episodes_are_not_played_on_engines_that_are_not_built(
    querl: Querl, company: Path, command: tuple[str, ...], setting: str
) -> None:
    shares = "sft.shares={sampled=1.0}"
    code, _, err = querl(*command, company / "recipe.toml", setting, shares)
    assert (code, err.count("\n")) == (2, 1)
    assert setting.replace("fp8", "'fp8'") in err
    assert err.endswith("is not built yet: leave it out\n")


def test_a_recipe_for_several_learners_may_be_evaluated(querl: Querl, company: Path) -> None:
    code, out, _ = querl("eval", company / "recipe.toml", "learner.num_gpus=8")
    assert code == 0
    assert "accuracy" in out


def test_a_second_run_on_a_folder_is_refused_even_with_fresh(
    querl: Querl, company: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with RunLock(out):
        ended = querl("train", company / "recipe.toml", "--out", out, "--fresh")
        assert_refused(ended, f"{out} is in use by process {os.getpid()}", "stop that one first")
        assert [path.name for path in out.iterdir()] == ["lock"]
