"""What all tests share: no settings and no cache of the user's, `--full`, and no silent skips."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="the full product of problems and targets, all cases and mistakes: hours"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before anything reads the environment."""
    for name in [n for n in os.environ if n.startswith(("MLA_JIT_", "TRITON_"))]:
        del os.environ[name]
    if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several torches on the same CPUs wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    directory = tempfile.TemporaryDirectory(prefix="mla_jit-tests-")
    os.environ["XDG_CACHE_HOME"] = directory.name
    config.add_cleanup(directory.cleanup)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a worker a CPU, but at most four; none beside a GPU, whose times others would disturb."""
    if config.option.markexpr == "gpu":
        return 0
    return min(4, len(os.sched_getaffinity(0)))


# Files of few tests that take long and share nothing: with `--dist loadgroup` each test goes to a worker that is free,
# at the end, where a whole file would keep one worker at it and leave the others idle.
APART = (
    "test_asm",
    "test_assembled",
    "test_decode_interpreted",
    "test_persistent_gluon",
    "test_prefill_gluon",
    "test_support",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of another file stay together: they share what a fixture makes."""
    for item in items:
        if item.path.stem not in APART:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """A pytest-xdist that does not know this pytest ignores groups, and each worker makes what a file's tests share."""
    stems = [Path(name.partition("::")[0]).stem for name in ids]
    alone = [
        name for name, stem in zip(ids, stems, strict=True) if stem not in APART and name.rpartition("@")[2] != stem
    ]
    if node.config.option.dist == "loadgroup" and alone:
        why = (
            f"pytest {pytest.__version__} and pytest-xdist do not group tests: use the versions of .ci/constraints.txt"
        )
        pytest.exit(f"{why} ({alone[0]})", returncode=4)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A test that is skipped shows nothing, so it fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"{len(skipped)} skipped: a skip is a failure here", red=True)


@pytest.fixture
def cache_dir(tmp_path) -> Iterator[str]:
    """An empty kernel cache for one test, with nothing remembered from before or left for after."""
    from mla_jit import plan, settings
    from mla_jit.compile import cache

    with settings.scope(cache_dir=tmp_path / "cache"):
        plan.forget()
        cache.forget()
        yield str(tmp_path / "cache")
    plan.forget()
    cache.forget()


@pytest.fixture
def null() -> Iterator[Any]:
    """Calls on CPU tensors planned for sm_90 and sent to the null runtime."""
    import mla_jit
    from mla_jit import launch, settings
    from mla_jit.launch.null import NullRuntime

    runtime = NullRuntime()
    with settings.scope(target="sm_90"):
        launch.override(runtime)
        mla_jit.reload()
        yield runtime
    launch.override(None)
    mla_jit.reload()
