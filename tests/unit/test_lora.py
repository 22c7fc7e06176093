"""An adapter in the model: exact gradients, the base below it, on disk, and merged."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_policy import decoder, make_samples, tiny_policy, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from querl.algorithm.logprobs import selected_logprobs
from querl.algorithm.pack import pack
from querl.errors import ConfigError, ModelError
from querl.trainer.attention import hidden_states, recomputed_activations, tree_attention
from querl.trainer.lora import (
    LoraSettings,
    add_adapter,
    dropping_out,
    has_adapter,
    merge_adapter,
    read_adapter,
    without_adapter,
)
from querl.trainer.model import load_model, save_model

CPU = torch.device("cpu")
IDS = torch.arange(20)[None]
SETTINGS = LoraSettings(rank=4, alpha=8)
SAMPLES = make_samples()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tiny_policy(), tiny_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, settings: LoraSettings = SETTINGS, *, seed: int = 0) -> PreTrainedModel:
    """The base with an adapter that does something."""
    model = load_model(base, device=CPU)
    add_adapter(model, settings, base=base, seed=seed)
    set_b(model)
    return model


def set_b(model: torch.nn.Module) -> None:
    """Away from zero, as training would move it."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(base: Path) -> None:
    model, plain = load_model(base, device=CPU), load_model(base, device=CPU)
    add_adapter(model, SETTINGS, base=base)
    assert torch.equal(logits(model), logits(plain))
    assert has_adapter(model)
    assert not has_adapter(plain)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert all("lora_" in name for name in trained)
    assert not any(module.training for module in model.modules())


def test_the_adapter_is_a_function_of_its_seed_and_leaves_random_numbers_alone(base: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    found = []
    for seed in (1, 1, 2):
        model = load_model(base, device=CPU)
        add_adapter(model, SETTINGS, base=base, seed=seed)
        name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
        found.append(model.get_parameter(name).detach().clone())
    assert torch.equal(torch.rand(1), expected)
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


@pytest.mark.parametrize("is_rank_stable", [False, True])
def test_what_the_adapter_adds_is_its_scaled_product(base: Path, is_rank_stable: bool) -> None:
    settings = LoraSettings(
        rank=4, alpha=6, targets=("q_proj", "down_proj"), is_rank_stable=is_rank_stable
    )
    model = adapted(base, settings)
    scale = 6 / math.sqrt(4) if is_rank_stable else 6 / 4
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    a, b = (layer.get_parameter(f"lora_{x}.default.weight") for x in "AB")
    x = torch.randn(3, a.shape[1])
    added = layer(x) - x @ layer.get_parameter("base_layer.weight").T
    torch.testing.assert_close(added, scale * x @ a.T @ b.T, rtol=1e-4, atol=1e-5)
    assert not hasattr(model.get_submodule("model.layers.1.mlp.up_proj"), "lora_A")


@pytest.mark.parametrize("wrong", ["c_attn", "lm_head", "embed_tokens", "proj", "all-linear"])
def test_a_target_that_is_no_matrix_of_the_layers_is_named_though_another_is(
    base: Path, wrong: str
) -> None:
    model = load_model(base, device=CPU)
    told = rf"lora\.targets=.*: '{wrong}' is no matrix of the layers: use some of .*, q_proj"
    with pytest.raises(ConfigError, match=told):
        add_adapter(model, LoraSettings(rank=2, targets=("q_proj", wrong)), base=base)
    assert not has_adapter(model)
    add_adapter(model, LoraSettings(rank=2, targets=("q_proj", "1.mlp.up_proj")), base=base)
    assert has_adapter(model)


def one_at_a_time(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients by transformers' own forward pass, sample by sample."""
    for sample in SAMPLES:
        token_ids = torch.tensor(sample.token_ids)[None]
        logprobs = model(token_ids).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(-1, token_ids[0, 1:, None])[:, 0]
        weights = torch.tensor(sample.advantages[1:]) * torch.tensor(sample.loss_mask[1:])
        (chosen * weights).sum().backward()
    return take_gradients(model)


def packed(model: PreTrainedModel, max_tokens: int, *, recompute: bool) -> dict[str, Tensor]:
    head = model.get_output_embeddings().weight
    recomputing = recomputed_activations(model) if recompute else nullcontext()
    with tree_attention(model), recomputing:
        for row in pack(SAMPLES, max_tokens):
            trained = row.loss_mask_T.nonzero().squeeze(1)
            hidden = hidden_states(model, row)[row.source_T[trained]]
            logprobs, _ = selected_logprobs(hidden, head, row.token_ids_T[trained])
            (logprobs * row.advantages_T[trained]).sum().backward()
    return take_gradients(model)


def take_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None
            found[name] = weight.grad
        else:
            assert weight.grad is None, name
        weight.grad = None
    return found


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shared_prompts_give_the_adapter_the_gradients_of_each_sample_alone(
    base: Path, tied: bool, recompute: bool
) -> None:
    model = decoder("qwen2", tied=tied)
    add_adapter(model, SETTINGS, base=base)
    set_b(model)
    expected = one_at_a_time(model)
    for max_tokens in (10**6, 60):
        found = packed(model, max_tokens, recompute=recompute)
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, name


def test_without_its_adapter_the_model_is_the_base_again(base: Path) -> None:
    model, plain = adapted(base), load_model(base, device=CPU)
    assert not torch.equal(logits(model), logits(plain))
    with without_adapter(model):
        assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model), logits(plain))


def test_dropout_acts_in_its_block_alone_and_follows_the_seed(base: Path) -> None:
    model = adapted(base, LoraSettings(rank=4, alpha=8, dropout=0.5))
    still = logits(model)
    assert torch.equal(logits(model), still)
    found = []
    for seed in (1, 1, 2):
        with dropping_out(model, seed=seed):
            found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], still)
    assert torch.equal(logits(model), still)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_a_saved_adapter_is_read_by_us_by_peft_and_by_transformers(
    base: Path, tmp_path: Path
) -> None:
    model, folder = adapted(base), tmp_path / "adapter"
    save_model(model, tiny_tokenizer(), folder)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 30_000
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)
    loaded = load_model(folder, device=CPU)
    assert torch.equal(logits(loaded), logits(model))
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(by_peft), logits(model))
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(by_transformers), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_base_plus_delta_and_plain(
    base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = adapted(base)
    save_model(model, tiny_tokenizer(), tmp_path / "adapter")
    merged = load_model(tmp_path / "adapter", device=CPU, dtype=dtype)
    merge_adapter(merged)
    assert not has_adapter(merged)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    a, b = (layer.get_parameter(f"lora_{x}.default.weight").to(dtype).float() for x in "AB")
    weight = layer.get_parameter("base_layer.weight").to(dtype).float() + 2 * b @ a
    assert torch.equal(merged.get_parameter(f"{name}.weight"), weight.to(dtype))
    save_model(merged, tiny_tokenizer(), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits(plain), logits(merged))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(plain).float(), logits(model), rtol=0, atol=tolerance)


def test_an_adapter_that_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_model(adapted(base), tiny_tokenizer(), folder)
    wider = adapted(base, LoraSettings(rank=8))
    with pytest.raises(ModelError, match=r"of another adapter: .*lora_A"):
        read_adapter(wider, folder)
    fewer = adapted(base, LoraSettings(rank=4, targets=("q_proj",)))
    with pytest.raises(ModelError, match="other matrices"):
        read_adapter(fewer, folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="missing or damaged"):
        load_model(folder, device=CPU)


def test_an_adapter_that_is_not_lora_alone_is_refused(base: Path, tmp_path: Path) -> None:
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    more = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    for name, config in (("other", other), ("more", more)):
        config.base_model_name_or_path = str(base)
        config.save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=f"{name} is not LoRA alone"):
            load_model(tmp_path / name, device=CPU)


def test_an_adapter_whose_base_is_gone_says_where_it_was(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_model(adapted(base), tiny_tokenizer(), folder)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"an adapter to .*base, which is not here"):
        load_model(folder, device=CPU)


def test_an_adapter_that_is_no_number_is_not_merged(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    save_model(adapted(base), tiny_tokenizer(), folder)
    path = folder / "adapter_model.safetensors"
    saved = {name: weight.fill_(float("nan")) for name, weight in load_file(path).items()}
    save_file(saved, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be merged"):
        merge_adapter(load_model(folder, device=CPU))


def test_four_bits_hold_the_layers_and_the_adapter_learns_above_them(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    # what some CPUs do instead repacks the weights, and has no backward pass
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    model = load_model(base, device=CPU, quantise="nf4")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.get_parameter("weight").dtype == torch.uint8
    assert model.get_output_embeddings().weight.dtype == torch.float32
    plain = logits(load_model(base, device=CPU))
    assert (logits(model) - plain).abs().mean() < 0.2 * plain.abs().mean()
    before = logits(model)
    add_adapter(model, SETTINGS, base=base)
    assert torch.equal(logits(model), before)
    set_b(model)
    expected = one_at_a_time(model)
    for name, gradient in packed(model, 10**6, recompute=True).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    save_model(model, tiny_tokenizer(), base.parent / "adapter")
    loaded = load_model(base.parent / "adapter", device=CPU, quantise="nf4")
    assert torch.equal(logits(loaded), logits(model))
