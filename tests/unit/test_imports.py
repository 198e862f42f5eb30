"""What importing costs, what is public, and who may import whom."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mla_jit

ROOT = Path(mla_jit.__file__).parents[1]
PACKAGE = ROOT / "mla_jit"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = "{m for m in sys.modules if m.split('.')[0] in ('torch', 'triton', 'cuda', 'numpy', 'pynvml', 'amdsmi', 'hip')}"

PUBLIC = {
    "decode", "decode_metadata", "decode_metadata_info", "DecodeMetadata",
    "decode_plan", "DecodePlan", "warmup", "supports", "last_dispatch", "reload", "export_plan", "load_plan",
    "autotune", "Dispatch", "Support", "prefill", "prefill_paged", "merge_state", "PrefillProblem",
    "DecodeProblem", "Problem", "Config", "Settings", "configure", "errors", "compat",
}  # fmt: skip

# Levels of rooms, lowest first. A module imports from lower levels and from its own room, never from a room beside it.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors settings resources",),
    ("dtypes", "target"),
    ("layouts",),
    ("problem config models",),
    ("compile",),
    ("launch",),
    ("ops",),
    ("tuning tuning.rows tuning.space tuning.heuristic tuning.store tuning.shipped tuning.lookup",),
    ("plan",),
    (
        "api api_guards api_metadata api_prefill torch_ops",
        "tuning.search",
        "tuning.report",
        "ahead",
        "explain",
        "trial",
        "doctor",
    ),
    (  # times the public functions beside the peers
        (
            "tuning.bench tuning.stand tuning.prompts tuning.prefill_grid "
            "tuning.candidate "
            "tuning.builds tuning.worker tuning.pool"
        ),
    ),
    ("tuning.sweep tuning.schedule tuning.database tuning.proofs tuning.overhead tuning.peers tuning.grids",),
    ("compat", "quickstart", "support", "tuning.auto", "tuning.predict"),
    ("cli cli_options cli_progress cli_tuning cli_database cli_report cli_predict cli_bench",),
)
# These describe kernels and compile them; nothing of them may need torch.
LIGHT = (
    "errors", "settings", "resources", "dtypes", "target", "layouts", "problem", "config", "models", "compile.cache",
    "compile.child", "compile.artifact", "launch", "launch.base", "launch.null", "ops", "ops.variant",
    "ops.decode.inputs", "ops.decode.splitk", "ops.decode.blocked_cpu", "ops.prefill.inputs", "ops.prefill.tiles",
    "ops.prefill.persistent", "ops.prefill.blocked_cpu", "ops.merge.inputs", "ops.merge.rows",
    "ops.merge.reduce", "tuning.rows",
    "tuning.store", "tuning.shipped", "tuning.lookup", "tuning.schedule", "plan", "ahead", "explain", "cli",
)  # fmt: skip


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert python(f"import sys, mla_jit; print({HEAVY})") == "set()\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["cache", "--help"]], ids=" ".join)
def test_help_of_the_command_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import atexit, runpy, sys; sys.argv = ['mla-tune', *{arguments!r}]; atexit.register(lambda: print({HEAVY}))"
    )
    printed = python(f"{code}; runpy.run_module('mla_jit.cli', run_name='__main__')")
    assert printed.startswith("Usage:")
    assert printed.endswith("set()\n")


def test_rooms_that_need_no_torch() -> None:
    code = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module("mla_jit." + module)
    if "torch" in sys.modules:
        sys.exit(module + " loads torch")
"""
    assert python(code) == ""


def test_operators_are_registered_at_once_where_torch_is_loaded() -> None:
    assert python("import torch, mla_jit; print(torch.ops.mla_jit.decode.default.name())") == "mla_jit::decode\n"


@pytest.mark.parametrize("use", ["mla_jit.decode", "import mla_jit.compat.aiter"])
def test_operators_are_registered_with_the_first_public_function(use: str) -> None:
    code = f"import mla_jit, torch; before = hasattr(torch.ops.mla_jit, 'decode'); {use}"
    assert python(f"{code}; print(before, hasattr(torch.ops.mla_jit, 'decode'))") == "False True\n"


def test_compiling_a_kernel_loads_no_torch_here_or_in_the_child() -> None:
    """The child blocks the import of torch; that it compiles shows that nothing of it needs torch."""
    code = """
import sys
from mla_jit.compile import child
from mla_jit.ops.decode.splitk import DECODE_SPLITK_TRITON as variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import by_name
problem, target = DecodeProblem(num_heads=4, kv_lora_rank=64, rope_dim=16, page_size=16), by_name("sm_80")
source, *_ = variant.sources(problem, target, variant.default(problem, target))
artifact = child.compile_apart(source, "mla_jit.compile.triton")
print(len(artifact.binary) > 1000, "torch" in sys.modules)
"""
    assert python(code) == "True False\n"


def test_the_public_surface() -> None:
    assert set(mla_jit.__all__) == PUBLIC
    assert len(mla_jit.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(mla_jit, name) is not None
    assert set(dir(mla_jit)) >= PUBLIC
    with pytest.raises(AttributeError, match="it has decode"):
        mla_jit.attention  # type: ignore[attr-defined]  # noqa: B018


def test_the_public_surface_is_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    shown = {a.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names if a.asname}
    assert shown == PUBLIC


def name_of(file: Path) -> str:
    """A module's name within the package: "ops.decode.inputs"; the package's own is ""."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


@functools.cache
def room_of(module: str) -> tuple[int, str]:
    """(level, room): of the longest name in LEVELS that is the module's or a package around it."""
    homes = {name: (i, room) for i, level in enumerate(LEVELS) for room in level for name in room.split()}
    while module and module not in homes:
        module = module.rpartition(".")[0]
    assert module, "give the module a place in LEVELS"
    return homes[module]


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("mla_jit").strip(".") for a in node.names if a.name.split(".")[0] == "mla_jit"
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            base = node.module or ""
            if base.split(".")[0] != "mla_jit":
                continue
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix("mla_jit").strip(".")
                public = mla_jit._HOMES.get(alias.name) if base == "mla_jit" else None
                found.add(name if name in MODULES else public or base.removeprefix("mla_jit").strip("."))
    return found - {""}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {""}))
def test_imports_point_one_way(module: str) -> None:
    level, room = room_of(module)
    for other in imports(module):
        other_level, other_room = room_of(other)
        assert other_level < level or other_room == room, f"{module} imports {other}, which is not below it"


def test_every_place_that_is_taken_is_a_module() -> None:
    named = {name for level in LEVELS for room in level for name in room.split()}
    assert named <= set(MODULES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"target"}))
def test_no_architecture_is_named(module: str) -> None:
    """Architecture is data; target.py alone puts a device's name together."""
    text = MODULES[module].read_text()
    assert re.findall(r"\bsm_?\d+\w*|\bgfx\d+\w*", text, re.IGNORECASE) == []


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"settings"}))
def test_the_environment_is_read_by_settings_alone(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    used = {f"{ast.unparse(n.value)}.{n.attr}" for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    used |= {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert used & {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"} == set()


def test_every_module_imports_and_says_what_it_knows() -> None:
    for module in sorted(set(MODULES) - {""}):
        source = MODULES[module].read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), f"{module} has no docstring"
        importlib.import_module(f"mla_jit.{module}")
