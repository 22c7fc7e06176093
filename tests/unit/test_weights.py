"""What a learner publishes loads into a fresh model of the same folder, name by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import VOCABULARY, decoder, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel
from transformers import Qwen3MoeConfig as MoeConfig

from querl.errors import ConfigError
from querl.trainer.lora import ADAPTER_WEIGHTS, LoraSettings, add_adapter, attach_adapter
from querl.trainer.model import ModelShape, load_model, new_model, save_model
from querl.trainer.weights import PublishedWeights

CPU = torch.device("cpu")
IDS = torch.arange(20)[None]
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def gemma() -> PreTrainedModel:
    config = Gemma3TextConfig(**SMALL, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config).eval()


def experts() -> PreTrainedModel:
    config = MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {
    "llama": lambda: decoder("llama", tied=False),
    "llama, tied": lambda: decoder("llama", tied=True),
    "qwen2": lambda: decoder("qwen2", tied=False),
    "qwen2, tied": lambda: decoder("qwen2", tied=True),
    "gemma3, tied": gemma,
    "experts that lie in memory as one": experts,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(1)
    return MODELS[request.param]()


def saved_weights(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name


def test_names_and_values_are_those_of_the_models_folder(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    published = PublishedWeights(model)
    assert not published.is_adapter
    assert published.module is model
    names = [name for name, _ in published.tensors()]
    assert len(names) == len(set(names))
    assert_same(dict(published.tensors()), saved_weights(model, tmp_path))


def test_what_an_update_writes_is_what_is_published_next() -> None:
    model = tiny_policy()
    before = {name: tensor.clone() for name, tensor in PublishedWeights(model).tensors()}
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    after = dict(PublishedWeights(model).tensors())
    assert [name for name in after if not after[name].equal(before[name])] == [
        "model.embed_tokens.weight"
    ]
    assert not any(tensor.requires_grad for tensor in after.values())


def test_an_adapter_leaves_no_trace_in_the_names_of_its_base(tmp_path: Path) -> None:
    model = tiny_policy()
    expected = saved_weights(model, tmp_path)
    add_adapter(model, LoraSettings(rank=2), base=tmp_path)
    published = PublishedWeights(model)
    assert published.is_adapter
    assert_same(dict(published.tensors()), expected)


def test_a_saved_adapter_makes_the_same_policy_of_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_model(tiny_policy(), tiny_tokenizer(), base)
    model = load_model(base, device=CPU)
    add_adapter(model, LoraSettings(rank=2), base=base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    PublishedWeights(model).save_adapter(adapter)
    assert (adapter / ADAPTER_WEIGHTS).exists()
    fresh = load_model(base, device=CPU)
    unlike = fresh(IDS).logits
    attach_adapter(fresh, adapter)
    assert fresh(IDS).logits.equal(model(IDS).logits)
    assert not fresh(IDS).logits.allclose(unlike)


def test_weights_in_4_bits_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # no narrower: bitsandbytes quantises blocks of 64
    shape = ModelShape(hidden_size=64, intermediate_size=128, num_layers=1, num_heads=2)
    save_model(new_model(shape, tiny_tokenizer(), seed=0), tiny_tokenizer(), tmp_path)
    model = load_model(tmp_path, device=CPU, dtype=torch.float32, quantise="nf4")
    with pytest.raises(ConfigError, match=r"nf4.*set lora\.quantise = 'none'"):
        list(PublishedWeights(model).tensors())
