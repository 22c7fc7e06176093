"""The memory plan: against measured peaks, published sizes, and the code that allocates."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

from querl.algorithm import logprobs
from querl.algorithm.pack import pack
from querl.errors import ModelError
from querl.rollout.hf import HfEngine
from querl.trainer import plan as plan_file
from querl.trainer.plan import Adapter, EnginePlan, PlanSettings, plan
from querl.trainer.shapes import PUBLISHED, shape_of
from querl.types import Sample

GIB = 2**30
QWEN_05B = PUBLISHED["Qwen/Qwen2.5-Coder-0.5B"]
QWEN_7B_OF_8_LAYERS = replace(PUBLISHED["Qwen/Qwen2.5-Coder-7B"], num_layers=8)
# benchmarks/tree_training.py on one H200, bf16, torch 2.11: peaks of forward and backward without
# an optimizer, in GiB. Rows of 31,200 tokens: one that shares its prompts, or several, unshared.
MEASURED = [
    (QWEN_05B, False, 43.2, 44.1),
    (QWEN_05B, True, 30.8, 31.7),
    (QWEN_7B_OF_8_LAYERS, False, 63.2, 68.5),
    (QWEN_7B_OF_8_LAYERS, True, 47.7, 53.0),
]
# In millions, of the model cards.
SIZES = {
    "Qwen/Qwen2.5-Coder-0.5B": 494,
    "Qwen/Qwen2.5-Coder-1.5B": 1544,
    "Qwen/Qwen2.5-Coder-3B": 3086,
    "Qwen/Qwen2.5-Coder-7B": 7616,
    "Qwen/Qwen2.5-Coder-14B": 14770,
    "Qwen/Qwen2.5-Coder-32B": 32764,
    "Qwen/Qwen3-4B": 4022,
    "HuggingFaceTB/SmolLM2-135M": 134.5,
    "google/gemma-3-270m": 268,
}


@pytest.mark.parametrize(("shape", "is_compiled", "one_row", "several_rows"), MEASURED)
def test_measured_peaks_on_a_gpu_are_met(shape, is_compiled, one_row, several_rows) -> None:
    settings = PlanSettings(tokens_per_microbatch=31_200, is_compiled=is_compiled)
    planned = plan(shape, settings)
    no_optimizer = planned.weights + planned.activations + planned.working
    assert no_optimizer / GIB == pytest.approx(one_row, rel=0.02)
    # from the second row on the first one's gradients are there, in bf16 like the weights
    assert (no_optimizer + planned.weights) / GIB == pytest.approx(several_rows, rel=0.02)


def test_the_measured_unshared_rows_held_as_many_tokens_as_the_shared_one() -> None:
    def sample(group: int) -> Sample:
        length = 2400
        return Sample(
            group_id=group,
            num_prompt_tokens=2000,
            token_ids=tuple(range(group, group + length)),
            loss_mask=(False,) * 2000 + (True,) * 400,
            sampled_logprobs=(0.0,) * length,
            advantages=(1.0,) * length,
            versions=(0,) * length,
        )

    samples = [sample(group) for group in range(6) for _ in range(8)]
    for share_prefix in (True, False):
        rows = pack(samples, 32768, share_prefix=share_prefix)
        assert max(row.num_tokens for row in rows) == 31_200


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert PUBLISHED[name].num_parameters / 1e6 == pytest.approx(SIZES[name], rel=0.001)


def test_chunks_of_logits_are_those_of_the_code() -> None:
    chunk = inspect.signature(logprobs.selected_logprobs).parameters["chunk_elements"].default
    assert chunk == plan_file.CHUNK_ELEMENTS
    assert logprobs.MIN_CHUNK_TOKENS == plan_file.MIN_CHUNK_TOKENS


def test_state_takes_eighteen_bytes_a_parameter_in_bf16_and_sixteen_in_float32() -> None:
    for compute_bytes, in_all in ((2, 18), (4, 16)):
        settings = PlanSettings(tokens_per_microbatch=1, compute_bytes=compute_bytes)
        planned = plan(QWEN_05B, settings)
        parts = planned.weights + planned.masters + planned.gradients + planned.moments
        assert parts == in_all * QWEN_05B.num_parameters
        assert planned.checkpoint == (in_all - 4) * QWEN_05B.num_parameters


def test_recomputing_keeps_the_layers_inputs_alone() -> None:
    kept = PlanSettings(tokens_per_microbatch=31_200)
    planned = plan(QWEN_05B, replace(kept, is_recomputed=True))
    norm = 8 * QWEN_05B.hidden_size * 31_200
    assert planned.activations == 24 * 2 * 896 * 31_200 + norm
    assert planned.peak < plan(QWEN_05B, kept).peak


def test_shards_divide_the_state_and_the_host_takes_what_is_offloaded() -> None:
    alone = plan(QWEN_05B, PlanSettings(tokens_per_microbatch=1024))
    settings = PlanSettings(tokens_per_microbatch=1024, shards=8)
    eighth = plan(QWEN_05B, settings)
    assert eighth.moments == alone.moments // 8
    assert eighth.weights == alone.weights // 8
    assert eighth.activations == alone.activations
    offloaded = plan(QWEN_05B, replace(settings, offload="optimizer"))
    assert offloaded.masters == offloaded.moments == 0
    # an eighth of the embedding in float32 is 65 MiB
    assert offloaded.offloaded == eighth.masters + eighth.moments + 128 * 2**20


def test_a_state_that_leaves_makes_room_for_the_engine_and_lies_on_the_host() -> None:
    engine = EnginePlan(has_own_weights=True, num_sequences=500, context=8000)
    here = PlanSettings(
        tokens_per_microbatch=1024, offload="optimizer", has_reference=True, engine=engine
    )
    stays, leaves = (plan(QWEN_05B, replace(here, offload=kind)) for kind in ("optimizer", "all"))
    assert stays.while_sampling - leaves.while_sampling == stays.state
    assert leaves.offloaded - stays.offloaded == stays.weights + stays.reference == stays.state
    assert leaves.while_updating == stays.while_updating
    assert leaves.peak == leaves.while_sampling == stays.peak - stays.state
    # weights are published while both have theirs
    small = replace(here, offload="all", engine=replace(engine, num_sequences=1, context=1))
    idle = plan(QWEN_05B, replace(small, tokens_per_microbatch=1))
    assert idle.peak >= idle.state + idle.engine_weights > idle.while_sampling


def test_eight_bits_and_no_masters_take_less_state() -> None:
    settings = PlanSettings(tokens_per_microbatch=1, moment_bytes=plan_file.EIGHT_BIT_MOMENTS)
    planned = plan(QWEN_05B, settings)
    assert planned.moments == int((2 + 1 / 32) * QWEN_05B.num_parameters)
    assert planned.masters == 4 * QWEN_05B.num_parameters
    least = plan(QWEN_05B, replace(settings, has_masters=False))
    assert least.masters == 0
    assert planned.checkpoint - least.checkpoint == planned.masters
    offloaded = plan(QWEN_05B, replace(settings, offload="optimizer"))
    assert offloaded.offloaded == planned.masters + planned.moments + GIB


def test_an_adapter_is_trained_and_four_bits_hold_the_rest() -> None:
    shape = PUBLISHED["Qwen/Qwen2.5-Coder-3B"]
    adapter = Adapter(rank=16, is_quantised=True, is_anchored=True)
    planned = plan(shape, PlanSettings(tokens_per_microbatch=1024, adapter=adapter))
    # rank (inputs + outputs) of q, k, v, o, gate, up and down, in each of 36 layers
    trained = 36 * 16 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    assert adapter.num_parameters(shape) == trained
    assert planned.gradients == planned.reference == planned.masters == 4 * trained
    assert planned.weights / 1e9 == pytest.approx(2.1, abs=0.1)
    only_queries = replace(adapter, targets=("q_proj",))
    assert only_queries.num_parameters(shape) == 36 * 16 * 4096


def test_a_cache_is_full_length_until_its_share_of_the_gpu_ends() -> None:
    engine = EnginePlan(has_own_weights=True, num_sequences=100, context=1000)
    settings = PlanSettings(tokens_per_microbatch=1024, engine=engine)
    full = plan(QWEN_05B, settings)
    assert full.kv_cache == 12_288 * 100 * 1000
    assert full.engine_weights == full.weights
    assert full.engine_working == full.kv_cache // 24  # one layer twice, while it grows
    served = plan(QWEN_05B, replace(settings, engine=replace(engine, most_bytes=80 * GIB)))
    assert served.kv_cache == full.kv_cache
    assert served.engine_working > 4 * 4 * 100 * 151_936  # logits that it samples from
    capped = replace(engine, most_bytes=full.weights + served.engine_working + GIB)
    assert plan(QWEN_05B, replace(settings, engine=capped)).kv_cache == GIB


def test_a_state_that_stays_is_no_room_for_a_servers_cache() -> None:
    share = 20 * GIB
    engine = EnginePlan(
        has_own_weights=True, num_sequences=500, context=8000, most_bytes=share, room=24 * GIB
    )
    settings = PlanSettings(tokens_per_microbatch=1024, engine=engine)
    for offload in ("none", "optimizer"):
        stays = plan(QWEN_05B, replace(settings, offload=offload))
        taken = stays.engine_weights + stays.engine_working
        assert stays.kv_cache == min(share, 24 * GIB - stays.state) - taken > 0
        assert stays.while_sampling <= 24 * GIB
    gone = plan(QWEN_05B, replace(settings, offload="all"))
    assert gone.sampling == share
    full = replace(settings, engine=replace(engine, room=8 * GIB))
    assert plan(QWEN_05B, full).kv_cache == 0


def test_what_the_hf_engine_keeps_of_finished_turns_is_counted_up_to_its_bound() -> None:
    bound = inspect.signature(HfEngine).parameters["reuse_bytes"].default
    assert bound == plan_file.REUSE_BYTES
    for num_kept, kept in ((0, 0), (50, 50 * 12_288 * 1000), (500, bound)):
        engine = EnginePlan(num_sequences=10, context=1000, num_kept=num_kept)
        planned = plan(QWEN_05B, PlanSettings(tokens_per_microbatch=1024, engine=engine))
        assert planned.engine_working == planned.kv_cache // 24 + kept


def test_sampling_beside_the_update_adds_up_and_taking_turns_does_not() -> None:
    engine = EnginePlan(has_own_weights=True, num_sequences=10, context=1000)
    settings = PlanSettings(tokens_per_microbatch=1024, engine=engine)
    in_turns = plan(QWEN_05B, settings)
    assert in_turns.peak == in_turns.state + max(in_turns.update, in_turns.sampling)
    beside = plan(QWEN_05B, replace(settings, engine=replace(engine, is_beside=True)))
    assert beside.peak == beside.state + beside.update + beside.sampling


def test_a_shape_is_read_from_the_folder_or_told_by_its_name(tmp_path: Path) -> None:
    assert shape_of(Path("models/Qwen2.5-Coder-7B-Instruct")) == PUBLISHED["Qwen/Qwen2.5-Coder-7B"]
    assert shape_of(Path("gemma-3-270m-it")) == PUBLISHED["google/gemma-3-270m"]
    assert shape_of(Path("my-model")) is None
    other = shape_of(Path("other-13b-chat"))
    assert other is not None
    assert other.num_parameters == pytest.approx(13e9, rel=0.05)
    config = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 10,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = shape_of(tmp_path)
    assert read is not None
    assert (read.num_kv_heads, read.head_dim, read.is_tied) == (4, 2, True)
    assert read.num_parameters == 2 * (4 * 64 + 3 * 128) + 80
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="describes no decoder"):
        shape_of(tmp_path)
