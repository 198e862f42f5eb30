"""The Triton toolchain as other code in the process sees it: threads compile at once and nothing of it stays behind."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mla_jit import ops, settings, target
from mla_jit.compile import triton as toolchain
from mla_jit.compile.artifact import Source
from mla_jit.problem import DecodeProblem

PROBLEM = DecodeProblem(num_heads=16, kv_lora_rank=96, rope_dim=0, max_kv_len=131072)  # quickly compiled


def sources(name: str) -> tuple[Source, ...]:
    """Triton's, whatever serves the problem by default."""
    row = target.targets()[name]
    variant = next(v for v in ops.variants("decode") if v.name == "decode_splitk_triton")
    return variant.sources(PROBLEM, row, variant.default(PROBLEM, row))


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_threads_compile_at_once_to_the_same_binaries(name: str) -> None:
    alone = [toolchain.compile_source(source).binary for source in sources(name)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(toolchain.compile_source, sources(name) * 2))
    assert [artifact.binary for artifact in together] == alone * 2


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_compiling_leaves_environment_knobs_and_keys_as_they_were(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    name = "TRITON_DISABLE_LINE_INFO"
    monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
    environment, knob, keys = dict(os.environ), knobs.compilation.disable_line_info, [s.key for s in sources("sm_80")]
    seen: list[list[str]] = []
    inside = threading.Thread(target=lambda: seen.append([s.key for s in sources("sm_80")]))
    with toolchain._without_line_info():
        assert knobs.compilation.disable_line_info
        inside.start()
        inside.join()
        for source in sources("sm_80"):
            toolchain.compile_source(source)
        assert knobs.compilation.disable_line_info
    assert seen == [keys]
    assert dict(os.environ) == environment
    assert knobs.compilation.disable_line_info == knob
    assert [s.key for s in sources("sm_80")] == keys


def test_a_fork_amid_compiling_gives_the_child_its_knobs_back() -> None:
    from triton import knobs

    before = knobs.compilation.disable_line_info, settings.compiler_knobs(), dict(os.environ)
    read, write = os.pipe()
    with toolchain._without_line_info():
        pid = os.fork()
        if pid == 0:  # pragma: no cover
            same = before == (knobs.compilation.disable_line_info, settings.compiler_knobs(), dict(os.environ))
            os.write(write, b"same" if same and toolchain._compiling == 0 else b"other")
            os._exit(0)
        os.waitpid(pid, 0)
    assert os.read(read, 16) == b"same"
    os.close(read)
    os.close(write)
