"""The wheel and the metadata: data files inside, nothing undeclared, and no Triton that pip would put over another."""

from __future__ import annotations

import ast
import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mla_jit
from mla_jit import resources

ROOT = Path(__file__).parents[2]
DISTRIBUTION = {
    "yaml": "pyyaml",
    "cuda": "cuda-bindings",
    "sqlite_utils": "sqlite-utils",
}  # where the import's name is another
# cuda-bindings and triton come with a GPU build of torch (pyproject.toml says why triton is an extra); numpy with the
# interpreter's tests; flash_mla is a peer that a benchmark compares with where it is installed.
NOT_DECLARED = {"cuda-bindings", "triton", "numpy", "flash_mla", "flashinfer"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(out),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(z.read(name))


def _tracked(folder: Path) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".ruff_cache", ".mypy_cache"} & set(path.parts)
    }


def test_the_wheel_has_the_package_and_the_data(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = {n for n in z.namelist() if ".dist-info/" not in n}
        entry = z.read(next(n for n in z.namelist() if n.endswith("entry_points.txt"))).decode()
    data = {f"mla_jit/_data/{n}" for folder in resources.NAMES for n in _tracked(ROOT / folder)}
    assert data
    assert names == _tracked(ROOT / "mla_jit") | data
    assert {"mla_jit/py.typed", "mla_jit/_data/configs/targets.yaml", "mla_jit/_data/tuning_db/evidence.jsonl"} <= names
    assert "mla-tune = mla_jit.cli:main" in entry


def test_an_installed_wheel_finds_its_data(wheel, tmp_path):
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        str(target),
        str(wheel),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    script = f"""
import sys; sys.path.insert(0, {str(target)!r})
import mla_jit
from mla_jit import resources, target, models, support
assert mla_jit.__file__.startswith({str(target)!r}), mla_jit.__file__
for name in resources.NAMES:
    assert str(resources.path(name)).startswith({str(target / "mla_jit" / "_data")!r}), resources.path(name)
assert target.targets() and models.models() and support.matrix()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_checkout_finds_its_data():
    for name in resources.NAMES:
        assert resources.path(name) == ROOT / name
    with pytest.raises(FileNotFoundError, match="reinstall"):
        resources.path("configs", "nothing.yaml")


def test_metadata(metadata):
    assert metadata["Name"] == "mla_jit"
    assert metadata["Version"] == mla_jit.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.10"
    assert f"\n## {mla_jit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def _requirements(metadata, extra: str | None = None) -> set[str]:
    lines = metadata.get_all("Requires-Dist")
    marker = None if extra is None else f"extra == '{extra}'"
    chosen = [
        line for line in lines if ("extra ==" not in line if marker is None else marker in line.replace('"', "'"))
    ]
    return {re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in chosen}  # type: ignore[index]


def test_pip_never_replaces_a_triton(metadata):
    """A ROCm Triton has another distribution name, so any requirement of ours would put the plain one over it."""
    assert "triton" not in _requirements(metadata)
    assert _requirements(metadata, "triton") == {"triton"}
    assert "triton" not in _requirements(metadata, "test")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(metadata):
    imported = set()
    for path in (ROOT / "mla_jit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module or "")
            imported |= {name.partition(".")[0] for name in names}
    foreign = {DISTRIBUTION.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"mla_jit"}}
    assert foreign - NOT_DECLARED - _requirements(metadata, "report") == _requirements(metadata)


def test_ci_pins_what_the_floors_allow():
    pins = dict(
        line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert {"torch", "triton", "ruff", "mypy", "pytest"} <= set(pins)
