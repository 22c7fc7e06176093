"""The shape of the code: imports point down, torch stays in its rooms, nothing grows too large."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import querl

ROOT = Path(querl.__file__).parent
LAYERS = {
    **dict.fromkeys(
        ("", "types", "errors", "config", "sections", "metrics", "loggers", "lookup", "durable"), 0
    ),
    **dict.fromkeys(("sql", "records"), 1),
    **dict.fromkeys(("env", "data", "algorithm"), 2),
    **dict.fromkeys(("rollout", "trainer", "suite"), 3),
    **dict.fromkeys(("eval", "run_check"), 4),
    **dict.fromkeys(("train", "run"), 5),
    **dict.fromkeys(("launch", "viewer"), 6),
    "cli": 7,
}
TORCH_ROOMS = ("algorithm/loss/", "trainer/", "launch/")
TORCH_FILES = (
    "algorithm/logprobs.py",
    "algorithm/pack.py",
    "rollout/hf.py",
    "rollout/hf_batch.py",
    "rollout/nccl.py",
    "rollout/pickled.py",
    "rollout/transfer.py",
    "rollout/worker/querl_vllm.py",
)
TORCH_IN_FUNCTIONS = ("cli/doctor.py",)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LINES_OF = {("train.py", "train"): 140}
MAX_PARAMETERS = 8
MAX_PARAMETERS_OF = {
    ("cli/eval.py", "evaluate"): 9,
    ("cli/score.py", "score"): 9,
    ("cli/train.py", "train"): 9,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_imports_point_down() -> None:
    assert [problem for path, text in files() for problem in upward_imports(path, text)] == []


def test_torch_is_imported_in_its_rooms_only() -> None:
    assert [problem for path, text in files() for problem in stray_torch(path, text)] == []


def test_files_functions_and_parameter_lists_stay_small() -> None:
    assert [problem for path, text in files() for problem in too_large(path, text)] == []


def test_the_configuration_loads_without_torch() -> None:
    code = "import querl.config, sys; raise SystemExit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, check=False, timeout=60)
    assert done.returncode == 0


def test_every_room_has_a_layer() -> None:
    assert {room(path) for path, _ in files()} <= set(LAYERS)


def test_an_upward_arrow_is_seen_in_every_spelling() -> None:
    for line in (
        "from querl.rollout.engine import Engine",
        "import querl.rollout.engine",
        "from querl import rollout",
        "def later():\n    from querl.rollout.engine import Engine",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import querl.rollout",
    ):
        assert upward_imports("sql/judge.py", line) == ["sql/judge.py imports rollout"]


def test_an_arrow_to_a_neighbour_of_the_same_layer_is_seen() -> None:
    assert upward_imports("algorithm/loss.py", "from querl.env.wire import Wire")
    assert not upward_imports("algorithm/loss.py", "from querl.algorithm.pack import MicroBatch")
    assert not upward_imports("config.py", "from querl.errors import ConfigError")


def test_imports_for_types_alone_are_free() -> None:
    text = "if TYPE_CHECKING:\n    import torch\n    from querl.cli.app import app"
    assert upward_imports("types.py", text) == []
    assert stray_torch("types.py", text) == []


def test_a_stray_torch_is_seen() -> None:
    assert stray_torch("env/rewards.py", "def reward():\n    from torch.nn import functional")
    assert stray_torch("cli/doctor.py", "import torch")
    assert not stray_torch("cli/doctor.py", "def doctor():\n    import torch")
    assert not stray_torch("env/rewards.py", "import torchvision_like_name")


def test_growth_is_seen() -> None:
    assert too_large("a.py", "\n" * MAX_FILE_LINES) == []
    assert too_large("a.py", "\n" * (MAX_FILE_LINES + 1)) == ["a.py has 401 lines"]
    assert too_large("a.py", "def f():\n" + "    1\n" * 60) == ["a.py: f has 61 lines"]
    assert too_large("train.py", "async def train():\n" + "    1\n" * 139) == []
    nine = "a, b, /, c, d, e, *f, g, h=1, **i"
    assert too_large("a.py", f"def f({nine}): ...") == ["a.py: f takes 9 parameters"]
    assert too_large("a.py", "class A:\n    def f(self, a, b, c, d, e, f, g, h): ...") == []


def files() -> Iterator[tuple[str, str]]:
    """Each file of the package: its path inside it, and its text."""
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def room(path: str) -> str:
    """``sql/judge.py`` -> ``sql``, ``types.py`` -> ``types``, ``__init__.py`` -> nothing."""
    name = path.split("/")[0].removesuffix(".py")
    return "" if name == "__init__" else name


def upward_imports(path: str, text: str) -> list[str]:
    """What a file imports from a higher layer, or from a neighbour above layer 0."""
    own = room(path)
    problems = []
    for _, name in imports(ast.parse(text)):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if package != "querl" or other == own or other not in LAYERS:
            continue
        if LAYERS[other] >= max(LAYERS[own], 1):
            problems.append(f"{path} imports {other}")
    return sorted(set(problems))


def stray_torch(path: str, text: str) -> list[str]:
    """Imports of torch where it does not belong."""
    if path.startswith(TORCH_ROOMS) or path in TORCH_FILES:
        return []
    return [
        f"{path} imports {name}"
        for is_top_level, name in imports(ast.parse(text))
        if name.split(".")[0] == "torch" and (is_top_level or path not in TORCH_IN_FUNCTIONS)
    ]


def imports(tree: ast.AST, *, is_top_level: bool = True) -> Iterator[tuple[bool, str]]:
    """Every import that can run: whether it runs on loading, and the dotted name.

    ``from a import b`` counts as ``a.b``, since ``b`` may be a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((is_top_level, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            yield from ((is_top_level, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for branch in node.orelse:
                yield from imports(ast.Module([branch], []), is_top_level=is_top_level)
        else:
            inside = is_top_level and not isinstance(node, Function)
            yield from imports(node, is_top_level=inside)


def too_large(path: str, text: str) -> list[str]:
    """Every limit of size that a file passes."""
    num_lines = text.count("\n")
    problems = [f"{path} has {num_lines} lines"] if num_lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, Function):
            continue
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if length > MAX_LINES_OF.get((path, node.name), MAX_FUNCTION_LINES):
            problems.append(f"{path}: {node.name} has {length} lines")
        count = num_parameters(node.args)
        if count > MAX_PARAMETERS_OF.get((path, node.name), MAX_PARAMETERS):
            problems.append(f"{path}: {node.name} takes {count} parameters")
    return problems


def num_parameters(arguments: ast.arguments) -> int:
    """All parameters but ``self`` and ``cls``."""
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    others = [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
    return len([one for one in [*named, *others] if one.arg not in ("self", "cls")])
