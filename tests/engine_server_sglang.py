"""A small real server with SGLang's routes and its sharp edges, over a real model on the CPU.

    python tests/engine_server_sglang.py --model-path FOLDER --port N --context-length N [...]

It takes the flags that SGLang would be started with. Where SGLang's scheduler dies of a failed
assertion, this process ends.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.hf import HfEngine

SAFE = ("torch.", "collections.", "builtins.")  # what SGLang lets a pickle name, where it matters


class Server:
    """One model, its tokenizer, and what SGLang's scheduler remembers."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.tokenizer = AutoTokenizer.from_pretrained(flags.model_path)
        self.model = AutoModelForCausalLM.from_pretrained(flags.model_path, dtype=torch.float32)
        # one row at a time: what a request gets does not depend on who asks beside it
        self.engine = HfEngine(self.model, self.tokenizer, max_batch=1)
        self.peft: PeftModel | None = None
        self.adapter: str | None = None
        self.released: set[str] = set()
        self.running: set[asyncio.Event] = set()  # set where a request is to be cut
        self.is_paused = False
        self.is_stale = False
        self.changed = asyncio.Condition()

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"internal_states": [{}]})

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        async with self.changed:
            await self.changed.wait_for(lambda: not self.is_paused)
        if self.released or self.is_stale:
            _die("a request ran on released memory, or on a cache of other weights")
        params = body["sampling_params"]
        context, num_read = self.flags.context_length, len(body["input_ids"])
        if num_read + params["max_new_tokens"] > context or num_read >= context - 6:
            return _refusal("Requested token count exceeds the model's maximum context length")
        params["max_new_tokens"] = min(params["max_new_tokens"], context - 2 - num_read)
        if body.get("lora_path") not in (None, self.adapter):
            return _refusal(f"LoRA adapter {body['lora_path']} was not loaded")
        cut = asyncio.Event()
        self.running.add(cut)
        try:
            return web.json_response(await self._sample(body, cut))
        finally:
            self.running.discard(cut)

    async def _sample(self, body: dict[str, Any], cut: asyncio.Event) -> dict[str, Any]:
        """Token by token, each from its seed and place alone, so that a cut changes nothing."""
        params, prompt = body["sampling_params"], tuple(body["input_ids"])
        assert params["top_p"] == 1.0
        assert params["no_stop_trim"]
        assert body["return_logprob"]
        sampling = Sampling(max_tokens=1, temperature=params["temperature"])
        found: list[tuple[float | None, int, None]] = []
        finish: dict[str, Any] = {"type": "length", "length": params["max_new_tokens"]}
        while len(found) < params["max_new_tokens"]:
            if cut.is_set():
                finish = {"type": "abort", "message": "Aborted", "status_code": None}
                break
            ids = tuple(token_id for _, token_id, _ in found)
            key = RequestKey(params["sampling_seed"], 0, 0, 0, turn=len(prompt) + len(ids))
            self._choose(body.get("lora_path"))
            one = await self.engine.generate(prompt + ids, sampling, key)
            token_id, ids = one.token_ids[0], ids + one.token_ids
            found.append((one.logprobs[0], token_id, None))
            if token_id in (self.tokenizer.eos_token_id, *params["stop_token_ids"]):
                finish = {"type": "stop", "matched": token_id}
                break
            stop = next((stop for stop in params["stop"] if stop in self._tail(ids, stop)), None)
            if stop is not None:
                finish = {"type": "stop", "matched": stop}
                break
        told = {"id": "0", "finish_reason": finish, "output_token_logprobs": found}
        return {"text": "", "output_ids": [i for _, i, _ in found], "meta_info": told}

    def _tail(self, ids: tuple[int, ...], stop: str) -> str:
        """As many tokens as the stop string has when it is encoded, and one: it may be missed."""
        num_tokens = len(self.tokenizer.encode(stop, add_special_tokens=False)) + 1
        text = self.tokenizer.decode(list(ids[-num_tokens:]))
        assert isinstance(text, str)
        return text

    def _choose(self, adapter: str | None) -> None:
        if self.peft is not None:
            switch = self.peft.base_model
            (switch.enable_adapter_layers if adapter else switch.disable_adapter_layers)()

    async def pause(self, request: web.Request) -> web.Response:
        assert (await request.json())["mode"] == "abort"
        self.is_paused = True
        for cut in self.running:
            cut.set()
        while self.running:
            await asyncio.sleep(0.01)
        return web.json_response({"status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        await request.json()
        async with self.changed:
            self.is_paused = False
            self.changed.notify_all()
        return web.json_response({"status": "ok"})

    async def flush_cache(self, request: web.Request) -> web.Response:
        if self.running:
            return web.Response(status=400, text="Timed out waiting for idle state.")
        self.is_stale = False
        return web.Response(text="Cache flushed.\n")

    async def release(self, request: web.Request) -> web.Response:
        tags = set((await request.json())["tags"])
        if self.running or not self.flags.enable_memory_saver:
            _die("release_memory_occupation should be called only when server is idle")
        self.released |= tags
        if "weights" in tags and not self.flags.enable_weights_cpu_backup:
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.zero_()
        return web.json_response(None)

    async def take_back(self, request: web.Request) -> web.Response:
        tags = set((await request.json())["tags"])
        if not tags <= self.released:
            _die(f"KeyError: {tags - self.released}")
        self.released -= tags
        return web.json_response(None)

    async def update_weights(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "weights" in self.released or body["flush_cache"]:
            _die("weights were loaded into released memory, or the cache was flushed too early")
        assert len(body["serialized_named_tensors"]) == self.flags.tp_size
        state = dict(self.model.named_parameters())
        for name, tensor in _unpickled(body["serialized_named_tensors"][0]):
            if name not in state:
                return web.json_response({"success": False, "message": name}, status=400)
            with torch.no_grad():
                state[name].copy_(tensor)
        self.is_stale = True
        return web.json_response({"success": True, "message": "Success"})

    async def load_adapter(self, request: web.Request) -> web.Response:
        body = await request.json()
        config = {**body["config_dict"], "use_rslora": False}  # SGLang knows of alpha / r alone
        rank, name = config["r"], body["lora_name"]
        if not self.flags.enable_lora or rank > self.flags.max_lora_rank or name == self.adapter:
            return web.json_response({"success": False, "error_message": name}, status=400)
        if self.peft is not None:
            self.model = self.peft.unload()
        with tempfile.TemporaryDirectory() as folder:
            tensors = _unpickled(body["serialized_named_tensors"][0])
            save_file(dict(tensors), Path(folder) / "adapter_model.safetensors")
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
            self.peft = PeftModel.from_pretrained(self.model, folder)
        self.adapter = name
        return web.json_response({"success": True})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not f"{module}.".startswith(SAFE):
            raise RuntimeError(f"Blocked unsafe class loading ({module}.{name})")
        return super().find_class(module, name)


def _unpickled(text: str) -> Any:
    return _Unpickler(io.BytesIO(base64.b64decode(text))).load()


def _refusal(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)


def _die(message: str) -> None:
    sys.stderr.write(f"AssertionError: {message}\n")
    sys.stderr.flush()
    os._exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context-length", type=int, required=True)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--max-lora-rank", type=int, default=0)
    for flag in ("memory-saver", "lora", "weights-cpu-backup"):
        parser.add_argument(f"--enable-{flag}", action="store_true")
    return parser.parse_known_args()[0]


def main() -> None:
    torch.set_num_threads(1)
    flags = parse()
    server = Server(flags)
    app = web.Application(client_max_size=2**30)
    app.router.add_get("/health", server.health)
    app.router.add_get("/server_info", server.info)
    for route, handler in {
        "/generate": server.generate,
        "/pause_generation": server.pause,
        "/continue_generation": server.resume,
        "/flush_cache": server.flush_cache,
        "/release_memory_occupation": server.release,
        "/resume_memory_occupation": server.take_back,
        "/update_weights_from_tensor": server.update_weights,
        "/load_lora_adapter_from_tensors": server.load_adapter,
    }.items():
        app.router.add_post(route, handler)
    web.run_app(app, host="127.0.0.1", port=flags.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
