"""What `mla-tune compile` builds with no GPU in sight is what a strict process on the GPU asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
HOME = Path(__file__).resolve().parents[2]
OPTIONS = ("--model", "deepseek-v3", "--tp", "8", "--dtype", "bf16,fp8", "--q-len", "1,2", "--lse", "yes")

# What a server meets, decoded in strict mode: a kernel that is not there is a CacheMiss.
CALLS = """
import itertools, json, torch, mla_jit
from mla_jit import trial
from mla_jit.problem import DecodeProblem
origins, worst = set(), 0.0
for batch, kv_len, q_len, paging, cache, ragged in itertools.product(
    (1, 2, 7, 32, 64, 200, 300), (1, 65, 700, 3000), (1, 2), ("table", "csr"), ("bf16", "fp8_e4m3"), (False, True)
):
    if batch * kv_len > 200_000:
        continue
    problem = DecodeProblem(num_heads=16, batch=batch, q_len=q_len, paging=paging, has_lens=paging == "table",
                            kv_dtype=cache, ragged=ragged, lse=True, max_kv_len=kv_len)
    call = trial.make_call(problem, "cuda", seed=batch + kv_len)
    out, lse = mla_jit.decode(call.q, call.kv_cache, **call.keywords)
    judged = trial.judge(call, out, lse)
    assert judged.ok, (problem, judged)
    origins.update(mla_jit.last_dispatch().origins)
print(json.dumps(sorted(origins)))
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, cwd=HOME, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_strict_process_finds_what_was_compiled_without_a_gpu(tmp_path: Path) -> None:
    cache = {"MLA_JIT_CACHE_DIR": str(tmp_path)}
    built = run("-m", "mla_jit.cli", "compile", "--target", "sm_90", *OPTIONS, **cache, CUDA_VISIBLE_DEVICES="")
    assert " 0 failed" in built
    found = run("-c", CALLS, **cache, MLA_JIT_MODE="strict")
    assert set(json.loads(found.splitlines()[-1])) <= {"disk", "memory"}
