from __future__ import annotations

from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_policy import VOCABULARY, decoder, make_samples, make_turn_samples
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
)

from querl.algorithm.logprobs import selected_logprobs
from querl.algorithm.pack import pack
from querl.errors import ModelError
from querl.trainer import attention, flex
from querl.trainer.attention import (
    compiled_layers,
    hidden_states,
    recomputed_activations,
    tree_attention,
)
from querl.trainer.flex import FlexRow, has_small_tiles, small_tiles
from querl.trainer.segments import SegmentAttention

SAMPLES = make_samples()
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def one_at_a_time(model, samples=SAMPLES):
    """Loss, gradients and hidden states by transformers' own forward pass, sample by sample."""
    model.zero_grad()
    total, hidden = 0.0, []
    for sample in samples:
        token_ids = torch.tensor(sample.token_ids)[None]
        output = model(token_ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-1][0].detach())
        logprobs = output.logits[0, :-1].log_softmax(-1).gather(-1, token_ids[0, 1:, None])[:, 0]
        weights = torch.tensor(sample.advantages[1:]) * torch.tensor(sample.loss_mask[1:])
        loss = (logprobs * weights).sum()
        loss.backward()
        total += loss.item()
    return total, gradients(model), hidden


def packed(model, max_tokens: int, *, share_prefix: bool, recompute: bool, samples=SAMPLES):
    model.zero_grad()
    total, hidden = 0.0, [torch.empty(0)] * len(samples)
    head = model.get_output_embeddings().weight
    recomputing = recomputed_activations(model) if recompute else nullcontext()
    with tree_attention(model), recomputing:
        for row in pack(samples, max_tokens, share_prefix=share_prefix):
            states = hidden_states(model, row)
            trained = row.loss_mask_T.nonzero().squeeze(1)
            logprobs, _ = selected_logprobs(
                states[row.source_T[trained]], head, row.token_ids_T[trained]
            )
            loss = (logprobs * row.advantages_T[trained]).sum()
            loss.backward()
            total += loss.item()
            remaining = states[trained].detach()
            for number in row.members:
                count = samples[number].num_loss_tokens
                hidden[number], remaining = remaining[:count], remaining[count:]
    return total, gradients(model), hidden


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def rows_give_what_each_sample_alone_gives(model, *, recompute: bool) -> None:
    loss, grads, hidden = one_at_a_time(model)
    for max_tokens, share_prefix in [(10**6, True), (60, True), (10**6, False)]:
        found_loss, found_grads, found_hidden = packed(
            model, max_tokens, share_prefix=share_prefix, recompute=recompute
        )
        assert found_loss == pytest.approx(loss, rel=1e-5)
        for name, grad in grads.items():
            assert relative_error(found_grads[name], grad) < 1e-5, name
        for sample, found, expected in zip(SAMPLES, found_hidden, hidden, strict=True):
            assert relative_error(found, expected[torch.tensor(sample.loss_mask)]) < 1e-5


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_rows_give_the_hidden_states_and_gradients_of_each_sample_alone(
    family, tied, recompute
):
    model = decoder(family, tied=tied)
    rows_give_what_each_sample_alone_gives(model, recompute=recompute)


def test_turns_of_their_own_prompts_give_the_gradients_of_each_alone():
    model, samples = decoder("qwen2", tied=True), make_turn_samples(3, 4)
    _, grads, _ = one_at_a_time(model, samples)
    for max_tokens in (10**6, 90):
        _, found, _ = packed(model, max_tokens, share_prefix=True, recompute=False, samples=samples)
        for name, grad in grads.items():
            assert relative_error(found[name], grad) < 1e-5, name


def test_recomputing_keeps_fewer_tensors_for_the_backward_pass():
    def num_kept(model, recomputing) -> int:
        kept: list[torch.Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with tree_attention(model), recomputing, hooks:
            hidden_states(model, pack(SAMPLES, 10**6)[0])
        return len(kept)

    model = decoder("qwen2", tied=True)
    before = num_kept(model, nullcontext())
    assert num_kept(model, recomputed_activations(model)) < before / 2


# of its own, as it looks at hidden states
looked_at_by_dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """The layers are traced and guarded as ever, and a graph runs as it is: none need be built."""
    sizes: list[int] = []

    def keep(graph, _inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    return sizes


@looked_at_by_dynamo
def test_layers_are_compiled_once_and_whether_recomputed_or_not(graphs):
    model, counts = decoder("qwen2", tied=True), []
    for recompute in (False, True):
        _, grads, _ = packed(model, 60, share_prefix=True, recompute=recompute)
        torch.compiler.reset()
        graphs.clear()
        for max_tokens in (60, 75, 90):  # rows of many lengths
            with compiled_layers(model):
                _, found, _ = packed(model, max_tokens, share_prefix=True, recompute=recompute)
            counts.append(len(graphs))
            for name, grad in grads.items():
                assert relative_error(found[name], grad) < 1e-5, name
    assert 0 < counts[0] < 8
    assert counts == counts[:1] * 6


@looked_at_by_dynamo
def test_outside_the_block_the_model_attends_as_before(graphs):
    model = decoder("qwen2", tied=True)
    token_ids = torch.arange(9)[None]
    before = model(token_ids).logits
    with suppress(KeyError), compiled_layers(model):
        packed(model, 10**6, share_prefix=True, recompute=True)
        assert graphs
        raise KeyError
    graphs.clear()
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)
    assert not model.training
    assert torch.equal(model(token_ids).logits, before)
    assert model(token_ids).past_key_values.get_seq_length() == 9
    assert not graphs


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        (Lfm2Config(layer_types=["conv", "full_attention"], **SIZE), "layers of kind conv"),
        (GptOssConfig(num_local_experts=2, num_experts_per_tok=1, **SIZE), "needs sinks"),
        (Gemma2Config(head_dim=12, **SIZE), "needs a soft cap"),
    ],
    ids=["convolutions", "sinks", "soft cap"],
)
def test_a_model_that_packed_rows_would_falsify_is_refused(config, lacking):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ModelError, match=lacking), tree_attention(model):
        hidden_states(model, pack(SAMPLES, 10**6)[0])


def test_a_sliding_window_hides_what_it_hides_from_a_sample_alone():
    rows_give_what_each_sample_alone_gives(gemma(), recompute=False)


def gemma():
    """A Gemma-3 whose first layer sees 7 tokens back and whose second sees all."""
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(
        Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=12,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.1,
        )
    ).eval()


def test_heads_too_narrow_for_the_fused_kernel_attend_by_plain_ones(monkeypatch):
    monkeypatch.setattr(attention, "has_newer_kernels", lambda device: device.type == "cuda")
    narrow, wide = decoder("qwen2", tied=True), gemma()
    wide.config.head_dim = 16
    assert attention.row_kind(narrow, torch.device("cuda")) is SegmentAttention
    assert attention.row_kind(wide, torch.device("cuda")) is FlexRow
    assert attention.row_kind(wide, torch.device("cpu")) is SegmentAttention


@pytest.mark.parametrize(
    ("head_width", "dtype", "shared_memory", "are_small"),
    [
        (256, torch.bfloat16, 101_376, True),  # a 3090, 4090, L4 or 5090
        (160, torch.float16, 101_376, True),
        (128, torch.float32, 101_376, True),
        (128, torch.bfloat16, 101_376, False),
        (64, torch.float32, 101_376, False),
        (256, torch.bfloat16, 166_912, False),  # an A100
        (256, torch.bfloat16, 232_448, False),  # an H100
    ],
)
def test_wide_heads_have_small_tiles_where_shared_memory_is_short(
    monkeypatch, head_width, dtype, shared_memory, are_small
):
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert has_small_tiles(head_width * dtype.itemsize, torch.device("cuda")) == are_small


def test_no_tile_is_larger_than_one_of_32_tokens_in_16_bits():
    # a tile has 16 tokens or more, and the row's blocks of 128 are whole tiles
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tiles = {n: size for n, size in small_tiles(dtype.itemsize).items() if "BLOCK" in n}
        assert len(tiles) == 6
        assert all(size * dtype.itemsize <= 64 and size >= 16 for size in tiles.values())
        assert all(flex.BLOCK % size == 0 for size in tiles.values())


def test_the_compiler_takes_tiles_as_constants_and_builds_for_rows_of_any_length_once(monkeypatch):
    found: list[dict[str, object]] = []

    def keep(graph, _inputs):
        calls = [node.args for node in graph.graph.nodes if "flex_attention" in str(node.target)]
        found.extend(option for args in calls for option in args if isinstance(option, dict))
        return graph.forward

    torch.compiler.reset()
    flex._in_small_tiles.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    monkeypatch.setattr(flex, "has_small_tiles", lambda head_bytes, device: True)
    for num_groups in (4, 6, 9):
        (packed_row,) = pack(make_samples(num_groups), 10**6)
        row = FlexRow(packed_row.segments, torch.device("cpu"))
        num_tokens = packed_row.num_tokens + row.num_padding
        query, key, value = (torch.randn(1, 2, num_tokens, 16) for _ in range(3))
        row.attend(query, key, value, scale=None, window=7)
    (options,) = found
    assert options.items() >= small_tiles(4).items()
    flex._in_small_tiles.cache_clear()


def test_more_kinds_of_rows_than_torch_compiles_by_itself_stay_compiled(monkeypatch):
    # a model in one type has several kinds, too: by window, gradients, and rows of one block
    torch.compiler.reset()
    flex._flex_attention.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (packed_row,) = pack(SAMPLES, 10**6)
    row = FlexRow(packed_row.segments, torch.device("cpu"))
    num_tokens = packed_row.num_tokens + row.num_padding
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads in (2, 3, 4):
            query, key, value = (torch.randn(1, heads, num_tokens, 16).to(dtype) for _ in range(3))
            row.attend(query, key, value, scale=None, window=None)  # it would warn, an error here
    flex._flex_attention.cache_clear()
