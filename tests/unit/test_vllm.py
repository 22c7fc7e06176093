"""vLLM's dialect: what is asked and understood, and weights that arrive in a server over HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from errno import ENOSPC
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from aiohttp import web
from engines import CONTEXT, SmallVllm
from tiny_policy import tiny_policy, tiny_tokenizer
from transformers import PreTrainedModel

from querl.config import load_recipe
from querl.errors import ConfigError, EngineError
from querl.launch.engines import make_dialect
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.http import Http
from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import ServerProcess
from querl.rollout.vllm import Vllm, VllmSettings
from querl.trainer.lora import LoraSettings, add_adapter
from querl.trainer.model import load_model, save_model
from querl.trainer.weights import PublishedWeights
from querl.types import Completion, FinishReason

SETTINGS = VllmSettings(model="/nowhere", dtype="bfloat16", context=CONTEXT, end_ids=(7,))
SAMPLING = Sampling(max_tokens=12)
KEY = RequestKey(0, 0, 0, 0, 0)
PROMPT = tuple(tiny_tokenizer().encode("SELECT name FROM city WHERE id = 1"))


def answer(reason: str, *tokens: tuple[int, float]) -> dict[str, Any]:
    """As vLLM 0.26 writes it."""
    content = [
        {
            "token": f"token_id:{token_id}",
            "logprob": logprob,
            "bytes": None,
            "top_logprobs": [{"token": f"token_id:{token_id}", "logprob": logprob, "bytes": None}],
        }
        for token_id, logprob in tokens
    ]
    choice = {
        "index": 0,
        "logprobs": {"content": content},
        "finish_reason": reason,
        "token_ids": [token_id for token_id, _ in tokens],
        "routed_experts": None,
    }
    return {"request_id": "a", "model": "m", "choices": [choice], "prompt_logprobs": None}


def flags(command: list[str]) -> dict[str, str]:
    """By name; those without a value are empty."""
    found: dict[str, str] = {}
    for word in command:
        if word.startswith("--"):
            found[last := word.removeprefix("--")] = ""
        elif found:
            found[last] = word
    return found


def command(**changed: Any) -> dict[str, str]:
    return flags(list(Vllm(replace(SETTINGS, **changed)).command(python="python", port=1234)))


def test_a_server_listens_to_this_machine_alone_and_tells_processed_logprobs() -> None:
    found = command()
    assert found["host"] == "127.0.0.1"
    assert found["port"] == "1234"
    assert found["logprobs-mode"] == "processed_logprobs"
    assert found["generation-config"] == "vllm"
    assert found["max-model-len"] == str(CONTEXT)
    assert {"enable-sleep-mode", "enable-prefix-caching"} <= found.keys()
    assert not {"enable-lora", "quantization"} & found.keys()


def test_options_win_over_ours_and_false_leaves_a_flag_out() -> None:
    options = {
        "max_model_len": 99,
        "enable_sleep_mode": False,
        "enforce_eager": True,
        "compilation_config": {"level": 0},
    }
    found = command(options=options)
    assert found["max-model-len"] == "99"
    assert "enable-sleep-mode" not in found
    assert found["enforce-eager"] == ""
    assert json.loads(found["compilation-config"]) == {"level": 0}


def test_an_option_may_be_spelt_as_the_flag_is() -> None:
    found = command(options={"max-model-len": 99, "enable-sleep-mode": False})
    assert found["max-model-len"] == "99"
    assert "enable-sleep-mode" not in found


def test_a_cache_of_a_given_size_asks_for_no_share_of_a_gpu_that_others_load_on() -> None:
    assert command()["gpu-memory-utilization"] == "0.8"
    assert "kv-cache-memory-bytes" not in command()
    found = command(cache_bytes=2**30)
    assert found["kv-cache-memory-bytes"] == str(2**30)
    assert float(found["gpu-memory-utilization"]) < 0.05


def test_graphs_are_captured_for_every_batch_that_there_may_be() -> None:
    assert "cudagraph-capture-sizes" not in command(max_batch=256)  # its own reach as far
    named = {"max-cudagraph-capture-size": 2000}
    assert "cudagraph-capture-sizes" not in command(max_batch=1000, options=named)
    words = list(Vllm(replace(SETTINGS, max_batch=1000)).command(python="python", port=1234))
    after = words[words.index("--cudagraph-capture-sizes") + 1 :]
    sizes = [int(word) for word in takewhile(str.isdigit, after)]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert {512, 1000} < set(sizes)
    assert sizes[-1] >= 1900


def test_several_frontends_need_an_entry_of_their_own_and_no_route_for_adapters() -> None:
    several = Vllm(replace(SETTINGS, frontends=4))
    words = list(several.command(python="python", port=1234))
    assert words[:4] == ["python", "-m", "vllm.entrypoints.cli.main", "serve"]
    assert flags(words)["api-server-count"] == "4"
    assert several.environment()["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert several.environment()["VLLM_SERVER_DEV_MODE"] == "1"


def test_an_adapter_that_is_to_be_evaluated_needs_a_single_frontend(tmp_path: Path) -> None:
    named = {"base_model_name_or_path": str(tmp_path), "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    recipe = load_recipe(None, ("engine.kind=vllm", "engine.frontends=2", f"model.path={tmp_path}"))
    with pytest.raises(ConfigError, match=r"engine\.frontends=2 .* set engine\.frontends=1"):
        make_dialect(recipe, end_ids=())


@pytest.mark.parametrize(
    ("cores", "overrides", "expected"),
    [
        (16, ("engine.max_batch=1024",), 4),
        (16, ("engine.max_batch=1024", "engine.frontends=8"), 8),
        (16, ("engine.max_batch=1024", "engine.frontends=1"), 1),
        (16, ("engine.max_batch=1024", "lora.rank=8"), 1),
        (16, ("engine.max_batch=256",), 1),
        (8, ("engine.max_batch=1024",), 1),
    ],
)
def test_many_requests_have_several_frontends_where_there_are_cores_for_them(
    tmp_path: Path, monkeypatch, cores: int, overrides: tuple[str, ...], expected: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    recipe = load_recipe(None, ("engine.kind=vllm", f"model.path={tmp_path}", *overrides))
    words = list(make_dialect(recipe, end_ids=()).command(python="python", port=1234))
    assert flags(words).get("api-server-count", "1") == str(expected)


def test_one_frontend_takes_adapters() -> None:
    one = Vllm(replace(SETTINGS, rank=8))
    words = list(one.command(python="python", port=1234))
    assert words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert "api-server-count" not in flags(words)
    assert one.environment()["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_a_rank_is_rounded_up_to_one_that_vllm_takes() -> None:
    assert command(rank=24)["max-lora-rank"] == "32"
    assert command(rank=64)["max-lora-rank"] == "64"
    with pytest.raises(EngineError, match=r"lora\.rank=513.*set a smaller"):
        command(rank=513)


def test_nothing_is_left_to_defaults_that_change_the_distribution() -> None:
    sampling = Sampling(max_tokens=5, temperature=0.7, top_p=0.9, stop=("</sql>",))
    route, body = Vllm(SETTINGS).request((1, 2), sampling, seed=2**63 + 3)
    asked = body["sampling_params"]
    assert route == "/inference/v1/generate"
    assert body["token_ids"] == [1, 2]
    assert "model" not in body
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.7, 0.9, 5)
    assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (0, 0.0, 1.0)
    assert (asked["stop"], asked["include_stop_str_in_output"]) == (["</sql>"], True)
    assert asked["skip_special_tokens"] is False
    assert asked["logprobs"] == 0
    assert asked["ignore_eos"] is True
    assert asked["seed"] == 3


def test_end_tokens_are_ours_and_those_of_the_models_folder(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3]}')
    dialect = Vllm(replace(SETTINGS, model=str(tmp_path)))
    asked = dialect.request((1,), SAMPLING, seed=0)[1]["sampling_params"]
    own = tiny_tokenizer().eos_token_id
    assert asked["stop_token_ids"] == sorted({3, 5, 7, own})
    assert dialect.piece(answer("stop", (9, -1.0), (5, -0.5))).finish is FinishReason.END


@pytest.mark.parametrize(
    ("reason", "last", "finish"),
    [
        ("stop", 7, FinishReason.END),
        ("stop", 8, FinishReason.STOP),
        ("length", 8, FinishReason.LENGTH),
        ("abort", 8, None),
    ],
)
def test_an_end_token_a_stop_string_the_limit_and_a_cut_are_told_apart(
    reason: str, last: int, finish: FinishReason | None
) -> None:
    piece = Vllm(SETTINGS).piece(answer(reason, (4, -0.25), (last, -1.5)))
    assert piece.token_ids == (4, last)
    assert piece.logprobs == (-0.25, -1.5)
    assert piece.finish is finish


def test_a_request_that_was_cut_while_it_waited_has_said_nothing() -> None:
    piece = Vllm(SETTINGS).piece(answer("abort"))
    assert piece.token_ids == piece.logprobs == ()
    assert piece.finish is None


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (answer("stop", (4, -9999.0)), "weights are broken"),
        (answer("error", (4, -1.0)), "ended by 'error'"),
    ],
)
def test_a_broken_answer_is_an_error(broken: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        Vllm(SETTINGS).piece(broken)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tiny_policy(), tiny_tokenizer(), tmp_path / "base")
    return tmp_path / "base"


def playing(base: Path, play: Callable[[HttpEngine], Awaitable[None]], *, rank: int = 0) -> None:
    settings = VllmSettings(model=str(base), dtype="float32", context=CONTEXT, rank=rank)
    dialect = SmallVllm(settings)
    process = ServerProcess(dialect, python=sys.executable, log=base.parent / "log")
    engine = HttpEngine(dialect, process, tiny_tokenizer(), context=CONTEXT)

    async def go() -> None:
        try:
            await play(engine)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(go(), timeout=120))


def expected(model: PreTrainedModel, completion: Completion) -> list[float]:
    """Log-probs of what was sampled, by a plain forward pass."""
    ids = torch.tensor([PROMPT + completion.token_ids])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, len(PROMPT) :, None])[:, 0].tolist()


def test_all_weights_arrive_and_nothing_of_the_old_ones_stays(base: Path) -> None:
    old, new = tiny_policy(), tiny_policy(seed=1)

    async def play(engine: HttpEngine) -> None:
        first = await engine.generate(PROMPT, SAMPLING, KEY)
        assert first.logprobs == pytest.approx(expected(old, first), abs=1e-5)
        await engine.load_weights(PublishedWeights(new), 1)
        second = await engine.generate(PROMPT, SAMPLING, KEY)
        assert second.versions == (1,) * len(second.token_ids)
        assert second.logprobs == pytest.approx(expected(new, second), abs=1e-5)

    playing(base, play)


@pytest.mark.slow
def test_weights_that_slept_are_loaded_again(base: Path) -> None:
    new = tiny_policy(seed=1)

    async def play(engine: HttpEngine) -> None:
        await engine.load_weights(PublishedWeights(new), 1)
        await engine.sleep()
        with torch.no_grad():
            new.get_input_embeddings().weight.mul_(1.5)
        await engine.load_weights(PublishedWeights(new), 2)
        await engine.wake()
        found = await engine.generate(PROMPT, SAMPLING, KEY)
        assert found.logprobs == pytest.approx(expected(new, found), abs=1e-5)

    playing(base, play)


@pytest.mark.slow
def test_each_version_of_an_adapter_samples_for_itself(base: Path) -> None:
    model = load_model(base, device=torch.device("cpu"))
    add_adapter(model, LoraSettings(rank=2), base=base)

    async def play(engine: HttpEngine) -> None:
        before = await engine.generate(PROMPT, SAMPLING, KEY)
        for version in (1, 2):
            torch.manual_seed(version)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.normal_(std=0.5)
            await engine.sleep()
            await engine.load_weights(PublishedWeights(model), version)
            await engine.wake()
            found = await engine.generate(PROMPT, SAMPLING, KEY)
            assert found.versions == (version,) * len(found.token_ids)
            assert found.logprobs == pytest.approx(expected(model, found), abs=1e-5)
            assert found.logprobs != pytest.approx(before.logprobs, abs=1e-2)

    playing(base, play, rank=2)


def test_a_server_elsewhere_needs_routes_that_its_owner_has_to_open(base: Path) -> None:
    async def go() -> None:
        runner = web.AppRunner(web.Application())
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        http = Http(f"http://{host}:{port}")
        try:
            with pytest.raises(EngineError, match=r"/pause refused: 404.*VLLM_SERVER_DEV_MODE=1"):
                await Vllm(SETTINGS).pause(http)
        finally:
            await http.close()
            await runner.cleanup()

    asyncio.run(go())


@pytest.mark.skipif(find_spec("vllm") is not None, reason="asks what happens without vllm")
def test_all_weights_reach_a_server_elsewhere_only_by_vllm_itself() -> None:
    dialect = Vllm(replace(SETTINGS, is_elsewhere=True))
    load = dialect.load(Http("http://127.0.0.1:1"), PublishedWeights(tiny_policy()))
    with pytest.raises(EngineError, match=r"pip install 'querl\[vllm\]', or train an adapter"):
        asyncio.run(load)


def test_an_adapter_for_a_server_elsewhere_is_written_where_both_see_it(
    base: Path, tmp_path: Path
) -> None:
    seen: list[bool] = []

    class Watching(Http):
        async def post(self, route: str, body: Any = None, **kwargs: Any) -> dict[str, Any]:
            if route == "/v1/load_lora_adapter":
                folder = Path(body["lora_path"])
                seen.append(folder.parent == tmp_path)
                seen.append((folder / "adapter_model.safetensors").exists())
            return {"success": True}

    model = load_model(base, device=torch.device("cpu"))
    add_adapter(model, LoraSettings(rank=2), base=base)
    dialect = Vllm(replace(SETTINGS, is_elsewhere=True, adapter_folder=tmp_path))
    asyncio.run(dialect.load(Watching("http://nowhere"), PublishedWeights(model)))
    assert seen == [True, True]
    assert dialect.request((1,), SAMPLING, seed=0)[1]["model"] == "querl-1"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


class Unwritable(PublishedWeights):
    """On a full disk."""

    is_adapter = True

    def save_adapter(self, folder: Path) -> None:
        raise OSError(ENOSPC, "No space left on device")


def test_an_adapter_that_finds_no_room_is_told_with_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoShare(NamedTuple):
        free: int = 60 * 2**20  # as in a container with Docker's own settings

    monkeypatch.setattr("shutil.disk_usage", lambda _: NoShare())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load = Vllm(SETTINGS).load(Http("http://nowhere"), Unwritable(tiny_policy()))
    with pytest.raises(EngineError, match=f"written to {tmp_path}: .*No space left.*: make room"):
        asyncio.run(load)


def test_a_server_that_keeps_what_it_had_computed_is_not_sampled_from() -> None:
    class Keeping(Http):
        async def post(self, route: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {"success": False} if route == "/reset_prefix_cache" else {}

    load = Vllm(SETTINGS).load(Keeping("http://nowhere"), PublishedWeights(tiny_policy()))
    with pytest.raises(EngineError, match="kept what it had computed"):
        asyncio.run(load)
