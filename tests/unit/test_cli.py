"""`mla-tune`: every verb, its JSON, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from mla_jit import cli, ops, quickstart, settings, support
from mla_jit.compile import cache
from mla_jit.doctor import Check
from mla_jit.problem import DecodeProblem

pytestmark = pytest.mark.usefixtures("cache_dir")
VARIANTS = {variant.name for variant in ops.variants("decode")}
SMALL = ["--heads", "16", "--kv-lora-rank", "64", "--rope-dim", "0"]  # compiles fast


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, list(arguments))
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result.stdout


def run_json(*arguments: str, code: int = 0):
    data = json.loads(run(*arguments, "--json", code=code))
    assert data["ok"] == (code == 0)
    return data


def _verbs(group: click.Group, prefix: tuple[str, ...] = ()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _verbs(command, (*prefix, name))
        else:
            yield (*prefix, name)


VERBS = list(_verbs(cli.main))


def test_the_verbs():
    assert {("quickstart",), ("compile",), ("explain",), ("support",), ("doctor",)} <= set(VERBS)
    assert {("cache", verb) for verb in ("ls", "verify", "gc", "clear")} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS, ids="-".join)
def test_every_verb_has_help_and_json_and_refuses_nonsense(verb):
    text = run(*verb, "--help")
    assert "--json" in text
    assert text.splitlines()[2].strip(), "a verb says what it does"
    run(*verb, "--nonsense", code=2)


def test_the_script_as_a_process(tmp_path):
    env = {**os.environ, "MLA_JIT_CACHE_DIR": str(tmp_path / "c")}
    command = [
        sys.executable,
        "-m",
        "mla_jit.cli",
        "explain",
        "--model",
        "deepseek-v2-lite",
        "--target",
        "cpu",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["variant"] == "decode_blocked_cpu"


def test_version():
    import mla_jit

    assert run("--version").strip() == f"mla-tune, version {mla_jit.__version__}"


def test_explain_says_everything_of_a_kernel():
    data = run_json("explain", *SMALL, "--target", "gfx950")
    assert (data["variant"], data["backend"], data["provenance"]) == ("decode_splitk_triton", "triton", "default")
    assert data["config"]["block_m"] == 16
    assert set(data["rejected"]) == VARIANTS - {"decode_splitk_triton"}
    for kernel in data["kernels"]:
        assert kernel["origin"] == "compiled"
        assert len(kernel["key"]) == 64
        assert os.path.isdir(kernel["path"])
        assert kernel["registers"] > 0
    text = run("explain", *SMALL, "--target", "gfx950")
    for kernel in data["kernels"]:
        assert kernel["key"] in text
        assert f"{kernel['registers']} registers, {kernel['spill_bytes']} B spilled" in text
    assert "not      decode_blocked_cpu: PyTorch ops on the CPU" in text


def test_explain_without_building_compiles_nothing():
    data = run_json("explain", *SMALL, "--target", "gfx950", "--no-build")
    assert {kernel["origin"] for kernel in data["kernels"]} == {"missing"}
    assert cache.entries() == []
    with settings.scope(mode="strict"):
        data = run_json("explain", *SMALL, "--target", "gfx950", code=1)
    assert "strict mode" in data["kernels"][0]["error"]


def test_explain_asks_for_what_a_call_asks_for():
    options = ["--dtype", "fp8", "--page-size", "16", "--q-len", "3", "--batch", "5", "--max-kv-len", "1000",
               "--paging", "csr+lens", "--lse", "--ragged", "--soft-cap", "--kv-scale", "--no-causal"]  # fmt: skip
    data = run_json("explain", "--model", "glm-5", "--tp", "4", "--target", "sm_90", "--no-build", *options)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in data["problem"].items()}
    assert DecodeProblem(**fields) == DecodeProblem(
        num_heads=16, kv_dtype="fp8_e4m3", page_size=16, q_len=3, batch=5, max_kv_len=1024, paging="csr", has_lens=True,
        lse=True, ragged=True, soft_cap=True, kv_scale=True, causal=False,
    )  # fmt: skip


def test_explain_of_what_nobody_serves_lists_every_reason():
    data = run_json("explain", "--heads", "4", "--dtype", "fp32", "--target", "sm_90", code=1)
    assert data["error"] == "NoVariant"
    assert set(data["reasons"]) == VARIANTS
    result = CliRunner().invoke(cli.main, ["explain", "--heads", "4", "--dtype", "fp32", "--target", "sm_90"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "NoVariant" in result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("explain",), ("explain", "--model", "gpt"), ("explain", "--heads", "4", "--model", "glm-5"),
        ("explain", "--heads", "4", "--target", "sm_75"), ("explain", "--heads", "4", "--dtype", "int4"),
        ("explain", "--heads", "0"), ("compile",), ("compile", "--model", "glm-5", "--tp", "5", "--target", "sm_90"),
        ("compile", "--model", "glm-5", "--page-size", "zero"),
        ("compile", "--model", "glm-5", "--paging", "none", "--target", "sm_90"),
        ("cache", "clear", "--json"), ("cache", "clear"), ("cache", "nonsense"), ("nonsense",),
        ("support", "--only", "sm_75", "--prove"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_2(wrong):
    run(*wrong, code=2)


def test_a_wrong_setting_is_usage(monkeypatch):
    monkeypatch.setenv("MLA_JIT_NONSENSE", "1")
    monkeypatch.setattr(settings, "_current", None)
    data = json.loads(run("cache", "ls", "--json", code=2))
    assert "MLA_JIT_NONSENSE" in data["message"]


def test_compile_then_find_then_look_after_the_cache():
    options = ["--model", "minicpm3-4b", "--target", "gfx950", "--dtype", "bf16", "--q-len", "1", "--paging", "table",
               "--lse", "no", "--ragged", "no", "--max-batch", "1", "--max-kv-len", "256", "--jobs", "2"]  # fmt: skip
    data = run_json("compile", *options)
    assert data["kernels"]
    assert {k["origin"] for k in data["kernels"]} == {"compiled"}
    cache.forget()
    text = run("compile", *options, "--verbose")
    assert (
        f"gfx950: {len(data['kernels'])} kernels: 0 compiled, {len(data['kernels'])} in the cache before, 0 failed"
        in text
    )
    assert data["kernels"][0]["key"][:16] in text

    listed = run_json("cache", "ls")
    assert {e["key"] for e in listed["entries"]} == {k["key"] for k in data["kernels"]}
    assert f"{len(data['kernels'])} kernels" in run("cache", "ls")
    assert run_json("cache", "verify")["faults"] == []

    victim = next(cache.root().glob("v1/??/*/kernel.bin"))
    victim.chmod(0o600)
    victim.write_bytes(b"\0" + victim.read_bytes()[1:])
    assert len(run_json("cache", "verify", code=1)["faults"]) == 1
    assert "BAD" in run("cache", "verify", code=1)
    assert "evicted" in run("cache", "verify", "--fix")
    assert run_json("cache", "verify")["entries"] == len(data["kernels"]) - 1

    assert run_json("cache", "gc")["entries"] == []
    assert len(run_json("cache", "gc", "--max-mb", "0")["entries"]) == len(data["kernels"]) - 1
    run("explain", *SMALL, "--target", "gfx950")
    assert run_json("cache", "clear", "--yes")["removed"] >= 1
    assert "0 kernels" in run("cache", "ls")
    assert "removed 0 kernels" in run("cache", "clear", "-y")
    assert "removed 0 kernels" in run("cache", "gc", "--max-age-days", "1")


def test_compile_falls_short_when_a_kernel_does(monkeypatch):
    from mla_jit.compile import farm
    from mla_jit.errors import IllegalArtifact

    def fail(source, **_):
        raise IllegalArtifact("too much of something", key=source.key)

    monkeypatch.setattr(farm.cache, "build_traced", fail)
    options = ["--model", "minicpm3-4b", "--target", "gfx950", "--lse", "no", "--ragged", "no", "--max-batch", "1"]
    data = run_json("compile", *options, code=1)
    assert {k["error"] for k in data["kernels"]} == {"too much of something"}
    assert "FAILED gfx950" in run("compile", *options, code=1)
    refused = run("compile", "--model", "minicpm3-4b", "--target", "gfx950", "--dtype", "fp32", code=1)
    assert "REFUSED" in refused
    assert "nothing to compile" in run("compile", "--model", "minicpm3-4b", "--target", "cpu")


def test_support(monkeypatch, tmp_path):
    data = run_json("support")
    assert len(data["cells"]) == len(support.matrix())
    assert run("support", "--markdown") == support.markdown(support.matrix())

    file = tmp_path / "evidence.jsonl"
    file.write_text("")
    real = support.resources.path
    monkeypatch.setattr(support.resources, "path", lambda *parts: file if parts == support.EVIDENCE else real(*parts))
    support.evidence.cache_clear()
    try:
        assert run_json("support", code=1)["failures"] == []  # nothing shown of anything
        run("support", "--prove", "--only", "cpu", code=1)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert {row["target"] for row in rows} == {"cpu"}
        assert {row["what"] for row in rows} == {"executed"}
    finally:
        support.evidence.cache_clear()


def test_doctor(monkeypatch):
    data = run_json("doctor")
    names = {check["name"] for check in data["checks"]}
    assert {"mla_jit", "python", "torch", "triton", "target", "data", "settings", "cache", "cache file system"} <= names
    assert "ok    torch" in run("doctor")
    from mla_jit import doctor

    monkeypatch.setattr(doctor, "examine", lambda: [Check("torch", "fault", "too old", "install a newer one")])
    assert "→ install a newer one" in run("doctor", code=1)
    assert run_json("doctor", code=1)["checks"][0]["remedy"] == "install a newer one"


def test_doctor_finds_what_is_wrong(monkeypatch, tmp_path):
    import torch

    from mla_jit import doctor

    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    monkeypatch.setenv("TRITON_SOMETHING", "1")
    with settings.scope(cache_dir=shared, cache_layers=(shared,)):
        cache.forget()
        found = {check.name: check for check in doctor.examine()}
    assert (found["torch"].status, found["torch"].remedy) == ("fault", "install a newer torch")
    assert found["cache"].status == "note"
    assert "can be written by others" in found["cache"].remedy
    assert found["cache layer"].status == "note"
    assert "TRITON_SOMETHING=1" in found["compiler variables"].value
    assert str(shared) in found["settings"].value


def test_doctor_never_raises(monkeypatch):
    from mla_jit import doctor

    monkeypatch.setattr(doctor.target, "here", lambda: 1 / 0)
    found = [check for check in doctor.examine() if check.status == "fault"]
    assert [check.value for check in found] == ["ZeroDivisionError: division by zero"]


def test_bench_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "needs a GPU" in run_json("bench", code=1)["message"]


def test_quickstart():
    data = run_json("quickstart")
    assert data["faults"] == []
    assert set(data["times_s"]) == {"import", "plan", "compile", "load", "launch"}
    assert {k["target"] for k in data["kernels"]} == set(quickstart.target.SHOWCASE)
    assert all(k["registers"] > 0 and k["cached_s"] < k["compile_s"] for k in data["kernels"])
    assert data["accuracy"]["rel_l2"] <= data["accuracy"]["rel_l2_limit"]
    assert cache.entries() == []  # it leaves nothing behind


def test_quickstart_as_text_and_with_a_wrong_result(monkeypatch):
    text = run("quickstart", "--no-cross")
    assert "where the time went" in text
    assert "all well" in text
    from mla_jit.trial import Judgement

    monkeypatch.setattr("mla_jit.trial.judge", lambda *args: Judgement(1.0, 1e-3, 0.0, 1e-3))
    text = run("quickstart", "--no-cross", code=1)
    assert "FAULT the result is off" in text
