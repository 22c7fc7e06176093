"""``querl sft`` as a user meets it: what it refuses, what it keeps, and how it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from company import company_recipe, make_company
from console import Querl
from safetensors.torch import load_file

from querl.data.traces import save_traces
from querl.launch.traces import make_traces, training_questions

ROOT = Path(__file__).parents[2]
NUM_STEPS = 200
SETTINGS = ("sft.shares={direct=1.0}", f"sft.epochs={NUM_STEPS}", "sft.lr=1e-3", "env.max_turns=2")


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``traces.jsonl`` of its training tasks."""
    folder = make_company(tmp_path_factory.mktemp("company"))
    recipe = company_recipe(folder, *SETTINGS)
    making = make_traces(recipe, training_questions(recipe), lambda *_: None)
    save_traces(folder / "traces.jsonl", asyncio.run(making).traces)
    return folder


def command(company: Path, out: Path, *more: str) -> list[str]:
    traces = str(company / "traces.jsonl")
    recipe = str(company / "recipe.toml")
    return ["sft", recipe, *SETTINGS, *more, "--traces", traces, "--out", str(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "last" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(company: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    code = "from querl.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command(company, out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_its_folder_tells_what_was_asked_and_what_follows(company: Path, whole: Path) -> None:
    assert (whole / "recipe.toml").read_text() == company_recipe(company, *SETTINGS).to_toml()
    derived = json.loads((whole / "derived.json").read_text())
    assert derived["updates"] == NUM_STEPS
    assert derived["traces to train on"] == len((company / "traces.jsonl").read_text().splitlines())


def test_a_finished_run_changes_nothing_and_says_how_to_start_over(
    querl: Querl, company: Path, whole: Path
) -> None:
    before = weights(whole)
    derived = (whole / "derived.json").read_text(encoding="utf-8")
    (company / "model").rename(company / "elsewhere")  # it takes no model to tell
    try:
        code, out, err = querl(*command(company, whole))
    finally:
        (company / "elsewhere").rename(company / "model")
    assert (code, err) == (0, "")
    assert f"{whole} holds a finished run: to start over, add --fresh" in out
    assert f"the model: {whole}/checkpoints/last/model" in out
    assert (whole / "derived.json").read_text(encoding="utf-8") == derived
    assert all(weights(whole)[name].equal(one) for name, one in before.items())


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (("--traces", "no-such-file.jsonl"), "no-such-file.jsonl"),
        (("model.path=no-such-model",), "no-such-model"),
    ],
)
def test_a_mistake_beside_fresh_does_not_cost_the_old_run(
    querl: Querl, company: Path, whole: Path, mistake: tuple[str, ...], named: str
) -> None:
    before = weights(whole)
    code, _, err = querl(*command(company, whole), "--fresh", *mistake)
    assert (code, err.count("\n"), named in err) == (2, 1, True), err
    assert all(weights(whole)[name].equal(one) for name, one in before.items())


def test_another_recipe_is_refused(querl: Querl, company: Path, whole: Path) -> None:
    code, _, err = querl(*command(company, whole, "sft.lr=0.5"))
    assert code == 2
    assert "sft.lr = 0.001, not 0.5: set it back to resume" in err


def test_other_traces_are_refused(querl: Querl, company: Path, whole: Path, tmp_path: Path) -> None:
    lines = (company / "traces.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:2]))
    code, _, err = querl(*command(company, whole), "--traces", tmp_path / "fewer.jsonl")
    assert code == 2
    assert f"holds a run on {len(lines)} traces (" in err
    assert "not on 2 traces (" in err
    assert "--fresh" in err


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_the_command_it_names_ends_the_same(
    querl: Querl, company: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run of mine"
    code = "from querl.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *command(company, out, "--fresh")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not (out / "checkpoints" / "last").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the run
        told, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    assert f"To go on: querl sft {company}/recipe.toml" in told
    assert "'sft.shares={direct=1.0}'" in told
    assert f"--out '{out}'" in told
    assert "--fresh" not in told
    stopped = json.loads((out / "checkpoints/last/state.json").read_text())["step"]
    assert 0 < stopped < NUM_STEPS
    code, told, _ = querl(*command(company, out))
    assert code == 0
    assert f"resuming after step {stopped}" in told
    assert all(weights(out)[name].equal(one) for name, one in weights(whole).items())


def test_a_run_whose_last_step_was_not_validated_is_prepared(
    querl: Querl, company: Path, tmp_path: Path
) -> None:
    """A kill came between the last checkpoint and its validation."""
    run = command(company, tmp_path / "run", "sft.epochs=1")
    assert querl(*run)[0] == 0
    state = tmp_path / "run" / "checkpoints" / "last" / "state.json"
    content = json.loads(state.read_text(encoding="utf-8"))
    assert content["cursor"]["num_unseen"] == 0  # one database, of which none is held out
    content["cursor"]["num_unseen"] = 1
    state.write_text(json.dumps(content), encoding="utf-8")
    (company / "model").rename(company / "elsewhere")
    try:
        code, _, err = querl(*run)
    finally:
        (company / "elsewhere").rename(company / "model")
    assert code == 2
    assert f"{company}/model" in err
