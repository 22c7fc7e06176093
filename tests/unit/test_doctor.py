"""`querl doctor`: what is here, what is missing, and what a recipe's model will take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from company import company_recipe, make_company
from console import Querl
from engines import install
from templates import FAMILIES
from tiny_policy import tiny_policy
from typer.testing import CliRunner

from querl.cli import doctor as doctor_file
from querl.cli.app import app
from querl.config import load_recipe
from querl.errors import ConfigError
from querl.launch.local import model_path
from querl.launch.needs import check_server, missing, needs, plan_settings
from querl.rollout.server import ServerProcess

WIDE = {"COLUMNS": "150"}
RECIPE_FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(RECIPE_FOLDER.rglob("*.toml"))


@pytest.fixture
def company(tmp_path: Path) -> Path:
    return make_company(tmp_path / "company")


def doctor(*arguments: object) -> tuple[int, str]:
    command = ["doctor", *map(str, arguments)]
    result = CliRunner().invoke(app, command, env=WIDE, catch_exceptions=False)
    return result.exit_code, result.output


def run_doctor(recipe: Path) -> tuple[int, str, str]:
    """The real command, in the repository's folder, without a data folder."""
    environment = {k: v for k, v in os.environ.items() if k != "QUERL_DATA"}
    done = subprocess.run(
        [sys.executable, "-c", "from querl.cli import main; main()", "doctor", str(recipe)],
        cwd=RECIPE_FOLDER.parent,
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_machine_that_has_everything_is_ready(company: Path) -> None:
    code, out = doctor(company / "recipe.toml")
    assert code == 0
    assert out.endswith("ready\n")
    assert all(f"\n{name} " in out for name in ("torch", "peft", "typer", "rich"))


def test_every_extra_that_a_user_may_want_is_told() -> None:
    project = tomllib.loads((RECIPE_FOLDER.parent / "pyproject.toml").read_text())["project"]
    extras = {name for name, packages in project["optional-dependencies"].items() if packages}
    assert extras - {"dev", "trl"} == set(doctor_file.EXTRAS)
    out = doctor()[1]
    for extra, (module, _) in doctor_file.EXTRAS.items():
        word = "installed" if find_spec(module) else f"pip install 'querl\\[{extra}]'"
        assert re.search(rf"^extra {extra} +{word}", out, re.MULTILINE), extra


def test_the_remedy_for_an_extra_is_printed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_file, "EXTRAS", {"gguf": ("no_such_module", "reads models")})
    assert "pip install 'querl[gguf]': reads models" in doctor()[1]


def test_the_plan_is_printed_part_by_part_in_gib(company: Path) -> None:
    recipe = company_recipe(company)
    taken = needs(recipe)
    assert taken is not None
    assert taken.num_gpus == 0
    code, out = doctor(company / "recipe.toml")
    assert code == 0
    assert re.search(r"^the model +0\.0M parameters; on the CPU:", out, re.MULTILINE)
    for part, size in taken.plan.lines():
        assert re.search(rf"^  {part} +{size / 2**30:,.2f} GiB", out, re.MULTILINE)
    assert f"checkpoints {taken.disk / 2**30:,.2f} GiB" in out
    assert taken.disk == taken.plan.checkpoint * (recipe.run.keep_checkpoints + 1)


def test_the_shape_of_the_plan_is_the_models_own(company: Path) -> None:
    taken = needs(company_recipe(company))
    assert taken is not None
    weights = tiny_policy().parameters()
    matrices = sum(weight.numel() for weight in weights if weight.ndim == 2)
    assert taken.shape.num_parameters == matrices


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_gets_a_plan_and_remedies(path: Path, monkeypatch) -> None:
    monkeypatch.delenv("QUERL_DATA", raising=False)
    monkeypatch.chdir(RECIPE_FOLDER.parent)
    code, out = doctor(path)
    problems = [line for line in out.splitlines() if line.startswith("missing: ")]
    assert out.splitlines()[-1] == (f"{len(problems)} missing" if problems else "ready")
    assert code == (1 if problems else 0)
    assert re.search(r"^  at most +[\d.,]+ GiB", out, re.MULTILINE)
    recipe = load_recipe(path)
    for setting in recipe.unsupported():
        assert f"missing: {setting}" in problems
    if not model_path(recipe).exists():
        assert any("the model" in line and "hf download" in line for line in problems)


@pytest.mark.parametrize(("recipe", "code"), [("demo", 0), ("skyrl-sql-7b", 1)])
def test_the_exit_code_of_the_command_says_whether_all_is_here(recipe: str, code: int) -> None:
    found, _, errors = run_doctor(RECIPE_FOLDER / f"{recipe}.toml")
    assert (found, errors) == (code, "")


def test_a_broken_recipe_has_exit_code_2_and_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[run]\nnum_step = 3\n", encoding="utf-8")
    code, out, err = run_doctor(broken)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "did you mean run.num_steps?" in err


def test_what_is_missing_comes_with_the_command_that_brings_it() -> None:
    found = list(missing(load_recipe(RECIPE_FOLDER / "skyrl-sql-7b.toml")))
    assert "engine.replicas=2 is not built yet" in found
    assert (
        "engine.kind=vllm needs the package vllm: pip install 'querl[vllm]', or set engine.python "
        "to an interpreter that has it"
    ) in found
    assert any(
        line.endswith(
            "hf download Qwen/Qwen2.5-Coder-7B-Instruct --local-dir "
            "models/qwen2.5-coder-7b-instruct"
        )
        for line in found
    )
    assert any(line.startswith("data: ") and "querl data get skyrl" in line for line in found)
    assert any(line.startswith("8 GPUs: this machine has ") for line in found)
    suite = list(missing(load_recipe(RECIPE_FOLDER / "spider-7b.toml")))
    assert any("querl suite build --data spider --split train --out" in line for line in suite)


def test_two_nodes_shard_the_state_sixteen_ways_and_all_of_it_leaves() -> None:
    recipe = load_recipe(RECIPE_FOLDER / "skyrl-sql-32b-2node.toml")
    taken = needs(recipe)
    assert taken is not None
    assert (taken.num_gpus, taken.num_nodes) == (8, 2)
    assert plan_settings(recipe).shards == 16
    assert taken.plan.masters == taken.plan.moments == 0
    # a sixteenth a GPU, by eight on each host: masters, moments, weights and the first weights,
    # with buffers for a sixteenth of the head; and the weights that eight load
    parameters = taken.shape.num_parameters
    buffers = 8 * 2**28
    assert taken.host == pytest.approx(
        8 * 16 * parameters / 16 + buffers + 8 * 2 * parameters, rel=0.001
    )
    assert taken.plan.while_sampling == taken.plan.sampling


def test_the_remedy_for_a_full_gpu_is_for_what_fills_it() -> None:
    shared = needs(load_recipe(RECIPE_FOLDER / "rl-text2sql-t4.toml"))
    leaving = needs(load_recipe(RECIPE_FOLDER / "skyrl-sql-32b-2node.toml"))
    staying = needs(load_recipe(RECIPE_FOLDER / "skyrl-sql-7b.toml"))
    assert shared is not None
    assert leaving is not None
    assert staying is not None
    for taken, remedy in (
        (shared, "a smaller engine.max_batch"),
        (leaving, "a smaller engine.memory_share"),
        (staying, "learner.offload=all, or a smaller engine.memory_share"),
    ):
        full = replace(taken, is_gpu_assumed=False, gpu_bytes=2**30)
        (problem, *_) = doctor_file._too_small(full)
        assert problem.endswith(
            "memory.checkpoint_activations, or fewer memory.tokens_per_microbatch"
        )
        cached = replace(taken.plan, activations=0, working=0, gradients=0, kv_cache=2**40)
        (problem, *_) = doctor_file._too_small(
            replace(full, plan=cached, gpu_bytes=cached.while_updating)
        )
        assert problem.endswith(f": set {remedy}")


SERVED = ("engine.kind=vllm", "engine.placement=colocated")
NO_VLLM = "is no interpreter that has vllm: name one, or install vllm there"


def test_an_interpreter_without_the_server_is_missing(
    company: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # isolated, so that this interpreter never sees the folder that is named below
    without = tmp_path / "without"
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    without.chmod(0o755)
    (tmp_path / "packages" / "vllm").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    broken = tmp_path / "broken"
    broken.write_bytes(b"no program")
    broken.chmod(0o755)
    for python in ("/nowhere/python", without, "/bin/false", broken, tmp_path):
        _, out = doctor(company / "recipe.toml", *SERVED, f"engine.python={python}")
        assert f"missing: engine.python='{python}' {NO_VLLM}" in out
    _, out = doctor(company / "recipe.toml", *SERVED, f"engine.python={sys.executable}")
    assert "engine.python" not in out


@pytest.mark.skipif(find_spec("vllm") is not None, reason="asks what happens without vllm")
@pytest.mark.parametrize(
    ("more", "named"),
    [((), "pip install 'querl[vllm]', or set engine.python"), (("engine.python=no",), NO_VLLM)],
    ids=["here", "elsewhere"],
)
@pytest.mark.parametrize("command", [("doctor", "--engine", "vllm"), ("train",), ("eval",)])
def test_a_server_that_is_not_installed_is_refused_in_one_line_before_it_starts(
    querl: Querl,
    company: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    more: tuple[str, ...],
    named: str,
) -> None:
    def never(self: ServerProcess) -> None:
        raise AssertionError("there is nothing to start")

    monkeypatch.setattr(ServerProcess, "launch", never)
    name, *options = command
    code, out, err = querl(name, company / "recipe.toml", *SERVED, *more, *options)
    assert (code, err.count("\n")) == (2, 1)
    assert named in err
    assert "BROKEN" not in out


def test_no_server_is_asked_without_a_client(
    company: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("vllm", monkeypatch)
    check_server(company_recipe(company, *SERVED))
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    elsewhere = ("engine.kind=vllm", "engine.placement=separate", "engine.url=http://gpu2:8000")
    for server in (SERVED, elsewhere):
        with pytest.raises(ConfigError, match=r"needs aiohttp: pip install 'querl\[openai\]'"):
            check_server(company_recipe(company, *server))


def test_the_base_of_an_adapter_is_kept_on_the_host_while_its_engine_sleeps() -> None:
    lora = needs(load_recipe(RECIPE_FOLDER / "spider-7b.toml"))
    full = needs(load_recipe(RECIPE_FOLDER / "spider-7b.toml", ("lora.rank=0",)))
    assert lora is not None
    assert full is not None
    assert lora.host == full.host + 2 * lora.plan.engine_weights  # pinned: powers of two
    assert lora.plan.engine_weights == 2 * lora.shape.num_parameters


def test_a_server_elsewhere_takes_no_gpu_here() -> None:
    colocated = needs(load_recipe(RECIPE_FOLDER / "spider-7b.toml"))
    at_url = ("engine.placement=separate", "engine.url=http://gpu2:8000")
    elsewhere = needs(load_recipe(RECIPE_FOLDER / "spider-7b.toml", at_url))
    assert colocated is not None
    assert elsewhere is not None
    assert elsewhere.num_gpus == 1
    assert elsewhere.plan.sampling == 0
    assert elsewhere.plan.peak == elsewhere.plan.while_updating == colocated.plan.while_updating


def test_a_copy_that_samples_beside_the_learner_needs_no_gpu_of_its_own(company: Path) -> None:
    recipe = company / "recipe.toml"
    taken = needs(company_recipe(company, "engine.placement=separate"))
    assert taken is not None
    assert taken.num_gpus == 0
    assert taken.plan.engine_weights == taken.plan.weights
    assert doctor(recipe, "engine.placement=separate", "run.max_lag=1")[0] == 0


def test_on_the_cpu_nothing_leaves() -> None:
    recipe = load_recipe(
        RECIPE_FOLDER / "demo.toml",
        ("learner.offload=all", "engine.placement=colocated", "model.device=cpu"),
    )
    taken = needs(recipe)
    assert taken is not None
    assert not taken.plan.leaves


def test_a_t4_takes_less_than_the_ten_gigabytes_of_its_published_table() -> None:
    """Base 2 GB, adapter 0.2, first adapter 0.2, cache 2, gradients and optimizer 6."""
    taken = needs(load_recipe(RECIPE_FOLDER / "rl-text2sql-t4.toml"))
    assert taken is not None
    gigabytes = {name: size / 1e9 for name, size in taken.plan.lines()}
    assert gigabytes["weights"] == pytest.approx(2.1, abs=0.1)  # with the adapter
    assert gigabytes["reference"] == pytest.approx(0.12, abs=0.01)
    # four answers of 2,056 tokens at 36,864 bytes each: theirs has room for seven times as much
    assert gigabytes["kv cache"] == pytest.approx(0.30, abs=0.01)
    learning = ("masters", "gradients", "moments", "activations", "working")
    assert sum(gigabytes[name] for name in learning) < 6
    assert taken.plan.peak < 12e9


def test_a_damaged_file_of_weights_is_named_with_exit_code_1(company: Path) -> None:
    weights = company / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, out = doctor(company / "recipe.toml")
    assert code == 1
    assert f"missing: {weights} is damaged" in out


def test_the_history_is_told_and_a_template_it_cannot_use_is_missing(company: Path) -> None:
    recipe = company / "recipe.toml"
    assert "the history: conversation; prompts only grow" in doctor(recipe)[1]
    FAMILIES["qwen3"].tokenizer().save_pretrained(company / "model")
    code, out = doctor(recipe)
    assert code == 1
    assert "rewrites earlier turns: set env.history=stepwise or env.history=single" in out
    code, out = doctor(recipe, "env.history=stepwise")
    assert code == 0
    assert "the history: stepwise; each prompt is rendered anew" in out


def test_episodes_longer_than_the_model_reads_are_told(company: Path) -> None:
    recipe = company / "recipe.toml"
    assert "tokens, and the limits of env allow 29,006: " in doctor(recipe)[1]
    assert "the limits of env" not in doctor(recipe, "env.max_prompt=100", "env.max_input=120")[1]


def test_thoughts_cannot_be_dropped_from_a_growing_prompt(company: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_thoughts.*set env\.history=stepwise"):
        doctor(company / "recipe.toml", "env.keep_thoughts=false")


def test_a_model_that_is_not_there_is_missing_and_takes_nothing_known(company: Path) -> None:
    code, out = doctor(company / "recipe.toml", f"model.path={company / 'none'}")
    assert code == 1
    assert f"missing: the model {company / 'none'}" in out
    assert f"what {company / 'none'} takes is known once it is here" in out
