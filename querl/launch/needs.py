"""What a recipe needs: what of it is not here, and how much memory and disk it will take."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from querl.config import SERVERS
from querl.data.get import SOURCES
from querl.errors import ConfigError, QuerlError
from querl.launch.local import TINY, load_reward_suite, make_history, model_path
from querl.launch.tasks import choose_tasks
from querl.loggers import missing_loggers
from querl.sql.databases import DRIVERS, database_kind, is_installed
from querl.trainer.flex import has_newer_kernels
from querl.trainer.model import choose_dtype, load_tokenizer
from querl.trainer.plan import (
    CONTEXT_BYTES,
    EIGHT_BIT_MOMENTS,
    FLOAT32,
    Adapter,
    EnginePlan,
    MemoryPlan,
    PlanSettings,
    cache_bytes,
    plan,
)
from querl.trainer.shapes import positions_of, published_name, shape_of

if TYPE_CHECKING:
    from querl.config import Recipe
    from querl.trainer.shapes import DecoderShape

KEY_VARIABLE = "OPENAI_API_KEY"  # never in a recipe: recipes are written into folders of runs
ASSUMED_GPU_BYTES = 80 * 2**30  # where there is none to ask: an H100's


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """A run's model and what it takes, in bytes; ``num_gpus`` is 0 for a run on the CPU."""

    shape: DecoderShape
    plan: MemoryPlan
    num_gpus: int  # on each of the nodes
    num_nodes: int
    gpu_bytes: int  # of each
    is_gpu_assumed: bool
    host: int  # of each node, beside what the operating system takes
    disk: int  # checkpoints kept, with the best one; the model's own folder comes on top
    model_on_disk: int


def needs(recipe: Recipe) -> Needs | None:
    """None where nothing is known of the model. Raises ModelError for a damaged config.json."""
    shape = shape_of(model_path(recipe))
    if shape is None:
        return None
    settings = plan_settings(recipe)
    planned = plan(shape, settings)
    gpus = num_gpus(recipe)
    learner = recipe.learner
    weights = settings.compute_bytes * shape.num_parameters
    loading = weights * max(learner.num_gpus, 1) if gpus else planned.peak
    # An engine that sleeps keeps the base of an adapter on the host: nobody loads it again. Its
    # memory there is pinned, of which torch takes powers of two.
    takes_turns = recipe.engine.kind in SERVERS and recipe.engine.placement == "colocated"
    kept = 2 * planned.engine_weights * gpus if takes_turns and recipe.lora.rank else 0
    return Needs(
        shape=shape,
        plan=planned,
        num_gpus=gpus,
        num_nodes=learner.num_nodes,
        gpu_bytes=_gpu_bytes(),
        is_gpu_assumed=gpus > 0 and not torch.cuda.is_available(),
        host=loading + kept + planned.offloaded * learner.num_gpus,
        disk=planned.checkpoint * (recipe.run.keep_checkpoints + 1),
        model_on_disk=2 * shape.num_parameters,
    )


def num_gpus(recipe: Recipe) -> int:
    """GPUs on each node that the recipe takes; 0 where it runs on the CPU here."""
    engine, learner = recipe.engine, recipe.learner
    of_engines = -(-engine.replicas * engine.tensor_parallel // learner.num_nodes)
    wanted = max(learner.num_gpus, of_engines)
    if engine.placement == "separate":
        # a copy of the hf engine lies beside the learner, and what has a URL is elsewhere
        has_own = engine.kind in SERVERS and engine.url is None
        wanted = learner.num_gpus + (of_engines if has_own else 0)
    must = wanted > 1 or engine.kind in SERVERS or recipe.lora.quantise != "none"
    must = must or recipe.model.device == "cuda"
    may = torch.cuda.is_available() and recipe.model.device != "cpu"
    return wanted if must or may else 0


def plan_settings(recipe: Recipe) -> PlanSettings:
    """What the plan asks for, from the recipe and from this machine."""
    learner, lora, memory = recipe.learner, recipe.lora, recipe.memory
    adapter = Adapter(
        rank=lora.rank,
        targets=lora.targets,
        is_quantised=lora.quantise != "none",
        is_anchored=lora.anchor > 0,
    )
    is_sharded = learner.kind == "fsdp"
    is_8bit = recipe.optimizer.kind == "adamw8bit"
    return PlanSettings(
        tokens_per_microbatch=memory.tokens_per_microbatch,
        compute_bytes=_compute_bytes(recipe),
        is_compiled=memory.compile,
        is_recomputed=memory.checkpoint_activations,
        fp32_head=memory.fp32_head,
        shards=learner.num_gpus * learner.num_nodes if is_sharded else learner.tensor_parallel,
        sequence_parallel=learner.sequence_parallel * learner.tensor_parallel,
        # the CPU's own memory is where everything is already
        offload="optimizer"
        if learner.offload == "all" and not num_gpus(recipe)
        else learner.offload,
        has_masters=recipe.optimizer.masters == "fp32",
        moment_bytes=EIGHT_BIT_MOMENTS if is_8bit else 2.0 * FLOAT32,
        adapter=adapter if lora.rank else None,
        has_reference=recipe.algorithm.kl.coefficient > 0,
        has_entropy=recipe.algorithm.entropy > 0,
        gathered_keys=_gathered_keys(recipe),
        engine=_engine(recipe),
    )


def context(recipe: Recipe) -> int:
    """Tokens that a prompt and its completion may have together."""
    env = recipe.env
    return (env.max_prompt if env.max_turns == 1 else env.max_input) + env.max_turn_tokens


def beyond_positions(recipe: Recipe) -> str | None:
    """One line where episodes may grow longer than the model can read; else None."""
    path = model_path(recipe)
    positions = positions_of(path)
    if positions is None or context(recipe) <= positions:
        return None
    return (
        f"the model {path.name} reads {positions:,} tokens, and the limits of env allow "
        f"{context(recipe):,}: what is longer is cut, and counts as wrong; set smaller "
        "env.max_prompt, env.max_input and env.max_turn_tokens"
    )


def server_cache(recipe: Recipe) -> int | None:
    """Bytes of the key-value cache that a server is planned with; None for an unknown model.

    Raises ConfigError where not even one sequence has room.
    """
    shape = shape_of(model_path(recipe))
    if shape is None:
        return None
    settings = plan_settings(recipe)
    planned = plan(shape, settings)
    least = cache_bytes(shape, settings, num_sequences=1)
    if planned.kv_cache >= least:
        return planned.kv_cache
    stays = planned.staying if settings.engine.room is not None else 0
    taken = planned.engine_weights + planned.engine_working
    raise ConfigError(
        f"no room on a GPU of {_gib(_gpu_bytes())} for the {_gib(least)} of keys and values of one "
        f"sequence of {settings.engine.context:,} tokens: engine.kind={recipe.engine.kind} takes "
        f"{_gib(taken)} without them, of engine.memory_share={recipe.engine.memory_share:g}, and "
        f"{_gib(stays)} of the learner stay beside it: set "
        f"{'learner.offload=all, ' if stays else ''}a larger engine.memory_share, or a smaller "
        "env.max_input"
    )


def server_share(recipe: Recipe) -> float:
    """``engine.memory_share``, or less where a learner beside the server leaves less of a GPU.

    For a server that sizes its cache by it. Raises ConfigError as ``server_cache`` does.
    """
    server_cache(recipe)  # raises where not one sequence has room
    share, found = recipe.engine.memory_share, needs(recipe)
    room = _engine(recipe).room
    if found is None or room is None:
        return share
    left = room - found.plan.staying - found.plan.engine_working
    return min(share, left / _gpu_bytes())


def missing(recipe: Recipe) -> Iterator[str]:
    """What is not here or not built, a line each, with its remedy."""
    yield from recipe.unsupported()
    yield from _missing_packages(recipe)
    yield from _missing_gpus(recipe)
    yield from _missing_model(recipe)
    yield from _missing_data(recipe)


def check_endpoint(recipe: Recipe) -> str:
    """The endpoint's URL. Raises ConfigError for a recipe that cannot be played at one."""
    url = recipe.engine.url
    if url is None:
        raise ConfigError(
            "engine.kind=openai needs an endpoint: set engine.url, such as http://127.0.0.1:8000/v1"
        )
    if recipe.model.path == TINY:
        raise ConfigError(
            f"engine.kind=openai plays a model of the endpoint at {url}: set model.path to its name"
        )
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("engine.kind=openai needs aiohttp: pip install 'querl[openai]'")
    return url


def check_server(recipe: Recipe) -> None:
    """Refuse a server that lacks a package, before it is started: raises ConfigError."""
    if recipe.engine.kind in SERVERS:
        for problem in _missing_for_server(recipe):
            raise ConfigError(problem)


def _compute_bytes(recipe: Recipe) -> int:
    if num_gpus(recipe) and not torch.cuda.is_available():
        return FLOAT32 if recipe.model.dtype == "fp32" else 2
    device = torch.device("cuda" if num_gpus(recipe) else "cpu")
    return choose_dtype(device, recipe.model.dtype).itemsize


def _gathered_keys(recipe: Recipe) -> float:
    """What the plan asks for of a group at full length; 0 where a fused kernel attends."""
    if not num_gpus(recipe) or not torch.cuda.is_available():
        return 0.0
    if has_newer_kernels(torch.device("cuda")):
        return 0.0
    if not recipe.memory.share_prefix:
        return 1.0
    size, prompt = recipe.run.group_size, recipe.env.max_prompt
    own = context(recipe) - prompt
    return (prompt + size * (prompt + own)) / (prompt + size * own)


def _engine(recipe: Recipe) -> EnginePlan:
    engine, run = recipe.engine, recipe.run
    is_separate = engine.placement == "separate"
    if is_separate and engine.url is not None:
        return EnginePlan(num_sequences=0)
    episodes = run.groups_per_step * run.group_size
    is_server = engine.kind in SERVERS
    return EnginePlan(
        has_own_weights=is_server or engine.placement != "shared",
        weight_bytes=1.0 if engine.dtype == "fp8" else float(_compute_bytes(recipe)),
        tensor_parallel=engine.tensor_parallel,
        num_sequences=min(engine.max_batch, -(-episodes // engine.replicas)),
        context=context(recipe),
        num_kept=0 if is_server else (run.max_lag + 1) * episodes,
        most_bytes=int(engine.memory_share * _gpu_bytes()) if is_server else None,
        room=_gpu_bytes() - CONTEXT_BYTES if engine.placement == "colocated" else None,
        is_beside=is_separate and engine.kind == "hf",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _gpu_bytes() -> int:
    if not torch.cuda.is_available():
        return ASSUMED_GPU_BYTES
    return int(torch.cuda.get_device_properties(0).total_memory)


def _missing_packages(recipe: Recipe) -> Iterator[str]:
    path = model_path(recipe)
    if recipe.engine.kind in SERVERS:
        yield from _missing_for_server(recipe)
    has_4_or_8_bits = recipe.lora.quantise != "none" or recipe.optimizer.kind == "adamw8bit"
    if has_4_or_8_bits and importlib.util.find_spec("bitsandbytes") is None:
        yield "the package bitsandbytes: pip install 'querl[qlora]'"
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        yield "the package gguf: pip install 'querl[gguf]'"
    if recipe.data.db is not None and not is_installed(own := database_kind(recipe.data.db)):
        yield f"the package {DRIVERS[own]}: pip install 'querl[{own}]'"
    yield from missing_loggers(recipe.run.loggers)


def _missing_for_server(recipe: Recipe) -> Iterator[str]:
    engine, kind = recipe.engine, recipe.engine.kind
    if engine.url is None and engine.python is None and importlib.util.find_spec(kind) is None:
        yield (
            f"engine.kind={kind} needs the package {kind}: pip install 'querl[{kind}]', or set "
            "engine.python to an interpreter that has it"
        )
    if engine.python is not None and not _has_module(engine.python, kind):
        yield (
            f"engine.python={engine.python!r} is no interpreter that has {kind}: name one, or "
            f"install {kind} there"
        )
    if importlib.util.find_spec("aiohttp") is None:
        yield f"engine.kind={kind} needs aiohttp: pip install 'querl[openai]'"


def _has_module(python: str, module: str) -> bool:
    """Whether a program is there, is a Python, and finds the module; imports nothing there."""
    look = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
    try:
        asked = subprocess.run([python, "-c", look], capture_output=True, check=False)
    except OSError:
        return False
    return asked.returncode == 0


def _missing_gpus(recipe: Recipe) -> Iterator[str]:
    wanted, here = num_gpus(recipe), torch.cuda.device_count()
    if wanted > here:
        nodes = recipe.learner.num_nodes
        on = f" on each of {nodes} nodes" if nodes > 1 else ""
        yield (
            f"{wanted} GPU{'s' if wanted > 1 else ''}{on}: this machine has "
            f"{here or 'no CUDA device'}; rent more, or set learner and engine to what is here"
        )


def _missing_model(recipe: Recipe) -> Iterator[str]:
    if recipe.engine.kind == "openai":
        try:
            check_endpoint(recipe)
        except ConfigError as error:
            yield str(error)
        return
    path = model_path(recipe)
    if not path.exists():
        name = published_name(path)
        if name is None:
            yield f"the model {path}: put a Hugging Face folder there, or set model.path"
        else:
            name += "-Instruct" if "instruct" in path.name.lower() else ""
            yield f"the model {path}: hf download {name} --local-dir {path}"
        return
    if path.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        return
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            yield f"{file} is damaged ({error}): download it again"
    try:
        make_history(recipe, load_tokenizer(path))
    except QuerlError as error:
        yield str(error)


def _missing_data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    try:
        choose_tasks(recipe)
    except QuerlError as error:
        name = data.source.partition(":")[0]
        get = f"; querl data get {name}" if name in SOURCES and data.db is None else ""
        yield f"data: {error}{get}"
    try:
        load_reward_suite(recipe)
    except QuerlError as error:
        build = f"querl suite build --data {data.source} --split {data.split}"
        yield f"the suite: {error}; {build} --out {recipe.reward.suite}"
