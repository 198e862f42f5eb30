"""Waits in vain: templates with a fault, whose debug build is stopped and names the barrier.

Each in a process of its own, which CUDA serves no more after that.
"""

from __future__ import annotations

import os
import subprocess
import sys

import cases
import pytest
from asm_mistakes import planted
from gpu.forced import AHEAD, BF16, DEVICE, SHARED, VARIANTS, WALK, decode, heads_of, install

from mla_jit import settings
from mla_jit.ops.decode.inputs import decode_inputs

pytestmark = pytest.mark.gpu

# Fault -> (file, its text, what that becomes, page size, a barrier that is waited for in vain).
_ARRIVAL = "{{ guard }} mbarrier.arrive.shared::cta.b64 _, [{{ bar }}];"
FAULTS = {
    "bytes that do not come": ("macros.ptx", ", {{ bytes }};", ", {{ bytes + 16 }};", 64, "full"),
    "the second tile": ("wide.ptx", "K_BOX, '@leads'", "K_BOX + 16 * b, '@leads'", 64, "full, set 0 buffer 1"),
    "buffers are not given back": ("macros.ptx", _ARRIVAL, "", 64, "empty"),
    "gathered tiles are not told": ("macros.ptx", _ARRIVAL, "", 1, "full"),
}
PLANTED = [
    (name, fault)
    for name in [*(n for n in VARIANTS if n not in (WALK, AHEAD, *SHARED)), "decode_splitk_asm, multicast"]
    for fault, (file, _, _, page, _) in FAULTS.items()
    if not (page < 8 and name in SHARED) and not (file == "wide.ptx" and "narrow" in name)
]


def plant(name: str, fault: str) -> None:
    """In the child: a call of a variant with the fault."""
    file, right, wrong, page, _ = FAULTS[fault]
    call = cases.build(cases.Case(heads=heads_of(name), lens=(40000, 64, 1), **{**BF16, "page": page}), DEVICE)
    with settings.scope(bounded_waits=True), planted(file, right, wrong):
        assert install(decode_inputs(call.q, call.kv_cache, **call.kwargs).problem, name) is not None
        decode(call)


@pytest.mark.parametrize(("name", "fault"), PLANTED)
def test_a_wait_in_vain_is_told(name: str, fault: str) -> None:
    code = f"from gpu import test_waits; test_waits.plant({name!r}, {fault!r})"
    code = f"import faulthandler; faulthandler.dump_traceback_later(60, exit=True); {code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode, "no wait was in vain"
    said = done.stderr.strip().splitlines()[-1]
    assert "LaunchError" in said, said
    assert "waited in vain" in said, said
    assert f" for '{FAULTS[fault][-1]}" in said, said
