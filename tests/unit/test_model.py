from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_policy import tiny_policy, tiny_tokenizer

from querl.errors import ModelError
from querl.trainer.model import (
    ModelShape,
    choose_device,
    load_model,
    load_tokenizer,
    new_model,
    save_model,
)

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tiny_policy(), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_loaded_as_it_was(folder):
    loaded, original = load_model(folder, device=CPU), tiny_policy()
    for name, weight in original.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight), name
    assert not loaded.training
    text = "SELECT name FROM city WHERE id = 7"
    assert load_tokenizer(folder).encode(text) == tiny_tokenizer().encode(text)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}


def test_a_new_model_is_a_function_of_its_seed():
    states = [tiny_policy(seed).state_dict() for seed in (1, 1, 2)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_new_model_has_the_shape_asked_for(family):
    tokenizer = tiny_tokenizer()
    shape = ModelShape(family=family, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2)
    model = new_model(shape, tokenizer, seed=0)
    assert (model.config.model_type, model.config.num_hidden_layers) == (family, 3)
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_making_a_model_leaves_the_global_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny_policy()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"has no \*.safetensors: download them"),
        ("tokenizer.json", "has no tokenizer .*: copy the tokenizer files"),
    ],
)
def test_a_folder_that_lacks_a_file_is_named_with_the_remedy(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(folder), load_model(folder, device=CPU)
    assert str(folder) in str(caught.value)


def test_a_path_that_is_no_folder_is_named(tmp_path):
    for load in (lambda p: load_model(p, device=CPU), load_tokenizer):
        with pytest.raises(ModelError, match=r"no model folder .*nowhere"):
            load(tmp_path / "nowhere")


def test_damaged_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="no model that transformers can load"):
        load_model(folder, device=CPU)


def test_weights_that_are_missing_are_never_made_up(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks 12 weights, the first is model.layers.2"):
        load_model(folder, device=CPU)


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=5.0,
    )
    save_model(CohereForCausalLM(config), tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ModelError, match="scales, caps or shifts its logits"):
        load_model(tmp_path / "model", device=CPU)


def test_a_model_whose_activations_leave_float16_is_refused_there_alone(tmp_path):
    model = tiny_policy()
    with torch.no_grad():
        for matrix in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj):
            matrix.weight.mul_(1e4)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    load_model(tmp_path / "model", device=CPU, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"leave float16.* model\.dtype='fp32'"):
        load_model(tmp_path / "model", device=CPU, dtype=torch.float16)


def test_weights_that_are_no_numbers_are_told_as_such(tmp_path):
    model = tiny_policy()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    with pytest.raises(ModelError, match="logits are not numbers: its weights are damaged"):
        load_model(tmp_path / "model", device=CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    assert choose_device("auto") == CPU
    with pytest.raises(ModelError, match="sees no CUDA device: use device=auto"):
        choose_device("cuda")


def write_gguf(path: Path, model: torch.nn.Module, tokenizer) -> None:
    """The model in llama.cpp's format, as its converter names things for Qwen2."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]] or ["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.named_parameters():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model_too(tmp_path):
    model, tokenizer = tiny_policy(), tiny_tokenizer()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, tokenizer)
    loaded = load_model(path, device=CPU)
    token_ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(token_ids).logits, model(token_ids).logits)
    assert load_tokenizer(path).eos_token_id == tokenizer.eos_token_id
    save_model(loaded, tokenizer, tmp_path / "saved")
    saved = load_model(tmp_path / "saved", device=CPU)
    assert torch.equal(saved(token_ids).logits, loaded(token_ids).logits)
