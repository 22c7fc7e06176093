"""Whole runs that train an adapter: resumed, evaluated, exported, and warmed up on traces."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from company import company_recipe, listener, make_company
from console import Querl
from safetensors.torch import load_file

from querl.errors import ConfigError
from querl.launch.local import load_policy, make_trainable, optimizer_settings
from querl.launch.training import train_locally
from querl.run import Run
from querl.trainer.lora import has_adapter, is_adapter
from querl.trainer.model import load_model
from querl.trainer.sft import Sequences, SftSettings, SftTrainer

LORA = ("lora.rank=4", "lora.alpha=64", "lora.anchor=0.01", "algorithm.kl=0.05")


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_company(tmp_path_factory.mktemp("company"))


def train(company: Path, folder: Path, *overrides: str) -> None:
    folder.mkdir(exist_ok=True)
    heard = listener()
    with Run(folder, company_recipe(company, *LORA, *overrides), heard, fresh=False) as run:
        asyncio.run(train_locally(company_recipe(company, *LORA, *overrides), run, heard.say))


def model_of(folder: Path) -> Path:
    return folder / "checkpoints" / "last" / "model"


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(model_of(folder) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(company: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without a break."""
    folder = tmp_path_factory.mktemp("whole")
    train(company, folder)
    return folder


@pytest.mark.parametrize(
    "kind",
    [
        (),
        ("learner.offload=optimizer", "memory.checkpoint_activations=true"),
        ("engine.placement=separate",),
    ],
    ids=["plain", "offload", "separate"],
)
def test_two_steps_and_two_after_a_resume_are_four_bit_for_bit(
    company: Path, whole: Path, tmp_path: Path, kind: tuple[str, ...]
) -> None:
    train(company, tmp_path, *kind, "run.num_steps=2")
    halfway = adapter(tmp_path)
    assert any(not halfway[name].equal(one) for name, one in adapter(whole).items())
    train(company, tmp_path, *kind, "run.num_steps=4")
    for name, one in adapter(whole).items():
        if kind == ("learner.offload=optimizer", "memory.checkpoint_activations=true"):
            torch.testing.assert_close(adapter(tmp_path)[name], one)
        else:
            assert adapter(tmp_path)[name].equal(one), name


def test_the_base_model_is_as_it_was_and_no_copy_of_it_is_kept(company: Path, whole: Path) -> None:
    assert is_adapter(model_of(whole))
    assert not (model_of(whole) / "model.safetensors").exists()
    trained = load_model(model_of(whole), device=torch.device("cpu"))
    base = load_file(company / "model" / "model.safetensors")
    for name, weight in trained.named_parameters():
        if name.endswith("base_layer.weight"):
            assert weight.equal(base[name.replace("base_layer.", "")])


def test_an_adapter_is_evaluated_and_exported(
    querl: Querl, company: Path, whole: Path, tmp_path: Path
) -> None:
    recipe, json = company / "recipe.toml", tmp_path / "summary.json"
    code, out, err = querl("eval", recipe, f"model.path={model_of(whole)}", "--json", json)
    assert code == 0, err
    assert "accuracy" in out
    code, out, err = querl(
        "export", model_of(whole), "--out", tmp_path / "plain", "--dtype", "fp32"
    )
    assert code == 0, err
    assert str(tmp_path / "plain") in out
    cpu, ids = torch.device("cpu"), torch.arange(30)[None]
    exported, trained = (load_model(p, device=cpu) for p in (tmp_path / "plain", model_of(whole)))
    assert not has_adapter(exported)
    torch.testing.assert_close(exported(ids).logits, trained(ids).logits)
    code, _, err = querl("export", model_of(whole), "--out", tmp_path / "plain")
    assert (code, "holds files already" in err) == (2, True)


def test_an_adapter_is_no_base_to_train(company: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is an adapter: make a model of it by querl export"):
        train(company, tmp_path, f"model.path={model_of(whole)}")


@pytest.mark.parametrize(
    "command",
    [
        ("train",),
        ("train", "engine.kind=vllm", "engine.placement=colocated"),
        ("sft", "--traces", "none.jsonl"),
        ("doctor", "--engine", "hf"),
    ],
    ids=["train", "train at a server", "sft", "doctor"],
)
def test_an_adapter_is_refused_before_it_is_loaded(
    company: Path, tmp_path: Path, querl: Querl, command: tuple[str, ...]
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")  # no weights, no tokens
    name, *more = command
    code, _, err = querl(name, company / "recipe.toml", f"model.path={tmp_path}", *more)
    assert (code, err.count("\n")) == (2, 1)
    assert f"is an adapter: make a model of it by querl export {tmp_path}" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.dropout=0.1", r"lora\.dropout=0\.1 would make new/old differ from 1"),
        ("lora.quantise=nf4", r"lora\.quantise='nf4' needs a GPU"),
        ("lora.targets=['q_prog']", r"lora\.targets=\['q_prog'\]"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    company: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(company, tmp_path, override)
    with pytest.raises(ConfigError, match=r"need an adapter: set lora\.rank"):
        company_recipe(company, "lora.quantise=nf4")


def test_supervised_training_of_an_adapter_resumes_with_its_dropout(
    company: Path, tmp_path: Path
) -> None:
    recipe = company_recipe(company, "lora.rank=4", "lora.dropout=0.3")
    sequences = Sequences.of(
        (list(range(n, n + 40)), [False] * 10 + [True] * 30) for n in range(20)
    )

    def trainer(**settings: bool) -> SftTrainer:
        policy = load_policy(recipe)
        make_trainable(recipe, policy)
        return SftTrainer(
            policy.model,
            policy.tokenizer,
            sequences,
            optimizer=optimizer_settings(recipe),
            settings=SftSettings(epochs=2, batch_tokens=200, **settings),
        )

    straight, first, second = trainer(), trainer(), trainer()
    before = straight.validation_loss(sequences)
    assert straight.num_steps == 8
    for _ in range(8):
        straight.train_step()
    for _ in range(3):
        first.train_step()
    first.save(tmp_path)
    second.load(tmp_path)
    for _ in range(5):
        second.train_step()
    pairs = zip(straight.model.named_parameters(), second.model.parameters(), strict=True)
    assert all(ours.equal(theirs) for (_, ours), theirs in pairs)
    assert straight.validation_loss(sequences) < before
    recomputing = trainer(checkpoint_activations=True)
    losses = [t.train_step()["sft/loss"] for t in (trainer(), recomputing)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
