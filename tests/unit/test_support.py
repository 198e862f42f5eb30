"""The support matrix, the models, and compiling ahead: what they say is what a call finds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch

import mla_jit
from mla_jit import ahead, models, ops, plan, resources, settings, support, target
from mla_jit.compat import aiter as compat_aiter
from mla_jit.compile import cache, triton
from mla_jit.dtypes import DTYPES
from mla_jit.errors import CacheMiss, InvalidInput
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.tuning import sweep
from mla_jit.tuning.rows import Trial
from mla_jit.tuning.store import Store

README = Path(__file__).parents[2] / "README.md"
CELLS = support.matrix()


def test_the_matrix_has_every_cell_once():
    assert len({cell.key for cell in CELLS}) == len(CELLS)
    backends = {(op, variant.backend) for op in ops.OPS for variant in ops.variants(op)}
    assert {backend for _, backend in backends} == set(support.BACKENDS)
    assert len(CELLS) == len(backends) * len(support.DTYPE_PAIRS) * len(target.targets())


def test_a_refused_cell_has_a_reason_and_the_others_have_evidence():
    for cell in CELLS:
        assert cell.state in support.STATES
        assert bool(cell.reason) == (cell.state == "refused"), cell
        assert (cell.evidence is not None) == (cell.state in ("compiled", "executed", "measured")), cell


def test_nothing_is_accepted_of_which_nothing_was_shown():
    assert [cell.key for cell in CELLS if cell.state == "unproven"] == []


def test_refusals_are_those_of_a_call():
    for cell in CELLS:
        if cell.backend == "triton":
            problem = support.problems(cell.op, cell.q_dtype, cell.kv_dtype)[0]
            found = plan.supports(problem, target.by_name(cell.target))
            served = found.ok and found.variant is not None and found.variant != f"{cell.op}_blocked_cpu"
            assert served == (cell.state != "refused"), cell


def test_everything_is_served_on_some_target_and_the_cpu_serves_everything():
    for op, (q, kv) in itertools.product(ops.OPS, support.DTYPE_PAIRS):
        served = {c.target for c in CELLS if (c.op, c.q_dtype, c.kv_dtype) == (op, q, kv) and c.state != "refused"}
        assert "cpu" in served
        assert "fp32" in (q, kv) or served == set(target.targets())


@pytest.mark.parametrize(
    "cell",
    [c for c in CELLS if c.target == "cpu" and c.state != "refused"],
    ids=lambda c: f"{c.op}-{c.q_dtype}x{c.kv_dtype}",
)
def test_what_is_executed_here_is_right(cell):
    (row,), failures = support.prove([cell])
    assert failures == {}
    assert row.what == "executed"


def test_a_cell_is_run_by_its_own_backend_though_another_be_faster(monkeypatch):
    cell = next(c for c in CELLS if c.key[-2:] == ("cpu", "cpu") and c.op == "decode" and c.q_dtype == "fp32")
    seen, decode = [], mla_jit.decode

    def watched(*args, **keywords):
        seen.append(settings.current().backends)
        return decode(*args, **keywords)

    monkeypatch.setattr(mla_jit, "decode", watched)
    with settings.scope(backends=("triton", "cpu")):
        assert support.prove([cell])[1] == {}
        assert settings.current().backends == ("triton", "cpu")
    assert set(seen) == {("cpu",)}


def test_evidence_of_another_revision_does_not_count(monkeypatch):
    cell = next(c for c in CELLS if c.evidence is not None)
    stale = dataclasses.replace(cell.evidence, variants=tuple((name, n + 1) for name, n in cell.evidence.variants))
    monkeypatch.setattr(support, "evidence", lambda: {cell.key: stale})
    assert next(c for c in support.matrix() if c.key == cell.key).state == "unproven"


def test_new_evidence_replaces_only_what_it_surpasses():
    row = support.Evidence(
        "decode", "bf16", "bf16", "sm_90", "triton", (("v", 1),), "measured", "2026-01-01", "d", "t", "c"
    )
    lesser, newer = (
        dataclasses.replace(row, what="compiled"),
        dataclasses.replace(row, what="compiled", variants=(("v", 2),)),
    )
    assert support.merged([row], [lesser]) == [row]
    assert support.merged([lesser], [row]) == [row]
    assert support.merged([row], [newer]) == [newer]
    other = dataclasses.replace(row, target="gfx942")
    assert support.merged([row], [other]) == [other, row]


def test_the_evidence_file_is_sorted_and_whole():
    lines = resources.path(*support.EVIDENCE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    keys = [support.Evidence.from_json(line).key for line in lines]
    assert keys == sorted(set(keys))
    for row in rows:
        assert row["what"] in support.STATES[2:]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
        assert all(row[name] for name in ("device", "toolchain", "command"))
        assert row["device"] != "none" or row["what"] == "compiled"


def test_the_readme_shows_the_matrix():
    text = README.read_text(encoding="utf-8")
    shown = text.split("<!-- support: begin -->\n")[1].split("<!-- support: end -->")[0]
    assert shown.strip() == support.markdown(CELLS).strip(), "paste the output of: mla-tune support --markdown"


def test_the_readme_shows_the_integration_that_is_tested():
    snippet = (README.parent / "tests" / "integration" / "README_SNIPPET.md").read_text(encoding="utf-8")
    assert snippet.strip() in README.read_text(encoding="utf-8")


def test_the_readme_has_the_settings():
    shown = re.findall(r"^\| `MLA_JIT_(\w+)` \| (.*?) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    fields = dataclasses.fields(settings.Settings)
    assert [name.lower() for name, _ in shown] == [f.name for f in fields]
    for (_, default), f in zip(shown, fields, strict=True):
        plain = {None: "unset", (): "none", False: "off", True: "on"}.get(f.default, str(f.default))
        assert default.strip("`") == plain, f.name


# ---------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("model", models.models().values(), ids=lambda m: m.name)
def test_a_model_is_whole(model):
    assert model.source
    assert set(model.dtypes) <= set(models.DTYPE_NAMES)
    assert model.max_kv_len >= 4096
    for there in target.targets().values():
        problem = next(models.decode_problems(model, there))
        assert problem.head_dim == model.kv_lora_rank + model.rope_dim
        assert plan.supports(problem, there), problem


def test_some_models_as_published():
    v3, mini = models.by_name("DeepSeek-V3"), models.by_name("minicpm3-4b")
    assert (v3.local_heads(8), v3.kv_lora_rank, v3.rope_dim) == (16, 512, 64)
    assert v3.sm_scale == pytest.approx(192**-0.5)
    assert (mini.heads, mini.kv_lora_rank, mini.rope_dim) == (40, 256, 32)
    with pytest.raises(InvalidInput, match="12 tensor-parallel ranks"):
        v3.local_heads(12)
    with pytest.raises(InvalidInput, match=r"no model 'gpt'.*deepseek-v3"):
        models.by_name("gpt")


def test_dtype_names():
    h, amd = target.by_name("sm_90"), target.by_name("gfx942")
    assert models.dtypes_on("fp8", h) == ("bf16", "fp8_e4m3")
    assert models.dtypes_on("fp8xfp8", amd) == ("fp8_e4m3fnuz", "fp8_e4m3fnuz")
    assert models.dtypes_on("fp16×fp8_e4m3", amd) == ("fp16", "fp8_e4m3")
    assert models.dtypes_on("fp8", target.by_name("sm_80")) == ("bf16", "fp8_e4m3")
    with pytest.raises(InvalidInput, match="'int4' is unknown"):
        models.dtypes_on("int4", h)


# ------------------------------------------------------------------------------------------------- compiling ahead


def _random_call(
    rng: random.Random, model: models.Model, there: target.Target, tp: int, page_sizes: tuple[int, ...]
) -> DecodeProblem:
    """A call that serving the model may make: any batch, any lengths, any of the ways to pass it."""
    q, kv = models.dtypes_on(rng.choice(model.dtypes), there)
    paging, scaled = rng.choice(["table", "csr"]), DTYPES[kv].bits == 8 and rng.random() < 0.5
    layouts = ["joint", "split"] + (["three"] if DTYPES[kv].bits == 8 < DTYPES[q].bits and not scaled else [])
    return DecodeProblem(
        num_heads=model.local_heads(tp), kv_lora_rank=model.kv_lora_rank, rope_dim=model.rope_dim, q_dtype=q,
        kv_dtype=kv, page_size=rng.choice(page_sizes), q_len=rng.choice([1, 2]), paging=paging,
        has_lens=paging == "table", lse=rng.random() < 0.5, ragged=rng.random() < 0.5, kv_scale=scaled,
        batch=rng.randint(1, rng.choice([4, ahead.MAX_BATCH])),
        q_split=rng.random() < 0.5, layout=rng.choice(layouts),
        max_kv_len=bucket(rng.randint(1, rng.choice([256, 8192, model.max_kv_len]))),
        total_kv=rng.choice([None, 4096]),
    )  # fmt: skip


@pytest.mark.parametrize(("name", "tp", "page_size"), [("sm_90", 1, 64), ("sm_90", 8, 1), ("gfx942", 8, 64)])
def test_what_is_compiled_ahead_is_all_that_calls_need(name, tp, page_size, request):
    """With `--full` for pages of both sizes in each case."""
    pages = (1, 64) if request.config.getoption("--full") else (page_size,)
    there, model, rng = target.by_name(name), models.by_name("deepseek-v3"), random.Random(0)
    kinds = models.decode_problems(model, there, tp=tp, page_sizes=pages, layouts=("joint", "three"))
    ready = {job.source.key for job in ahead.jobs_of(ahead.of_any_size(kinds, there), there).jobs}
    for _ in range(160):
        problem = _random_call(rng, model, there, tp, pages)
        choice = plan.choose(problem, there)
        for source in choice.variant.sources(problem, there, choice.config):
            assert source.key in ready, f"{source.name} of {problem}"


def test_a_row_of_a_kernel_for_any_length_is_compiled_ahead_for_all_sizes(tmp_path):
    """It refuses few splits and is measured for few sequences; which sizes are asked first must not matter."""
    there = target.by_name("sm_90")
    (variant,) = (v for v in ops.variants("decode") if v.any_length)
    rows, served = [], []
    for length, batch in itertools.product((1024, 65536), (1, 4)):
        problem = DecodeProblem(num_heads=64, batch=batch, max_kv_len=length, hinted=True)
        config = variant.default(problem, there).replace(short_m=16)
        rows.append(
            Trial(
                problem=problem, config=config, target=there.name, device=there.device, revision=variant.revision,
                median_us=1.0, toolchain=triton.version(), effort=2,
            )
        )  # fmt: skip
    with Store(tmp_path / "tuning.db") as opened:
        opened.add(rows)
    with settings.scope(tuning_db=tmp_path / "tuning.db", shipped_db=False):
        mla_jit.reload()
        for hinted in (False, True):
            kind = DecodeProblem(num_heads=64, hinted=hinted, max_kv_len=65536)
            ready = {job.source.key for job in ahead.jobs_of(ahead.of_any_size([kind], there, max_batch=8), there).jobs}
            for batch, length in itertools.product((1, 2, 4, 5), (100, 1024, 5000, 65536)):
                call = dataclasses.replace(kind, batch=batch, max_kv_len=length)
                choice = plan.choose(call, there)
                served.append(choice.variant)
                assert {s.key for s in choice.variant.sources(call, there, choice.config)} <= ready, call
    mla_jit.reload()
    assert served.count(variant) >= 10


def test_a_layout_with_scales_is_for_fp8_beside_16_bits():
    """Of these dtypes the others are left out; kv_scale is none of its calls'."""
    there, model = target.by_name("sm_90"), models.by_name("deepseek-v3")
    kinds = list(models.decode_problems(model, there, dtypes=("bf16", "fp8", "fp8xfp8"), layouts=("three",)))
    assert {(p.layout, p.q_dtype, p.kv_dtype, p.kv_scale) for p in kinds} == {("three", "bf16", "fp8_e4m3", False)}
    assert len(kinds) == len(set(kinds))
    assert all(
        p.q_scale for p in models.decode_problems(model, there, dtypes=("fp8",), layouts=("three",), scales="all")
    )
    with pytest.raises(InvalidInput, match="layout 'three' needs an fp8 cache and q in 16 bits"):
        next(models.decode_problems(model, there, dtypes=("bf16",), layouts=("three",)))
    with pytest.raises(InvalidInput, match="layout 'four' is unknown; use joint, split, three"):
        next(models.decode_problems(model, there, layouts=("four",)))
    shapes = sweep.shapes([(model, 8)], there, dtypes=("bf16", "fp8"), layout="three", batches=(1,), kv_lens=(4096,))
    assert [(p.layout, p.kv_dtype, p.num_heads) for p in shapes] == [("three", "fp8_e4m3", 16)]


@pytest.mark.parametrize("name", ["sm_90", "gfx950"])
def test_schedules_are_compiled_ahead_too(name):
    """The persistent scheduler's kernels, by a list of the call's own and by a shared one, made in AITER's spelling."""
    there, model, rng = target.by_name(name), models.by_name("deepseek-v3"), random.Random(0)
    ready = set()
    for planned in models.PLANNED["persistent"]:
        kinds = models.decode_problems(
            model, there, tp=8, page_sizes=(64,), dtypes=("bf16",), scheduler="persistent", planned=planned
        )
        ready |= {job.source.key for job in ahead.jobs_of(ahead.of_any_size(kinds, there), there).jobs}
    bf16 = torch.bfloat16
    for _ in range(60):
        batch, q_len = rng.choice((1, 7, 64, 300)), rng.choice((1, 2))
        groups = rng.choice((None, 99))
        made = compat_aiter._problem(batch, q_len, 16, 1, bf16, bf16, page_size=64, planned=True, groups=groups)
        for problem in (made, dataclasses.replace(made, planned=False, groups=None, lse=True)):
            choice = plan.choose(problem, there)
            for source in choice.variant.sources(problem, there, choice.config):
                assert source.key in ready, f"{source.name} of {problem}"


def test_strict_mode_finds_what_was_compiled_ahead_and_nothing_else(cache_dir):
    there, model = target.by_name("gfx950"), models.by_name("minicpm3-4b")
    few = {"page_sizes": (64,), "q_lens": (1,), "pagings": ("table",), "lse": (False,), "ragged": (False,)}
    found = ahead.jobs_of(ahead.of_any_size(models.decode_problems(model, there, **few), there, max_batch=1), there)
    heard = []
    built = ahead.build_all(found.jobs, workers=2, on_done=heard.append)
    assert sorted(b.job.source.key for b in heard) == sorted(j.source.key for j in found.jobs)
    assert all(b.ok and b.origin == "compiled" for b in built), [b.error for b in built]
    cache.forget()
    with settings.scope(mode="strict"):
        for length in (1, 100, 5000, model.max_kv_len):
            problem = DecodeProblem(num_heads=40, kv_lora_rank=256, rope_dim=32, max_kv_len=bucket(length))
            executable = plan.executable_for(problem, there)
            assert set(executable.dispatch.origins) <= {"disk", "memory"}
        with pytest.raises(CacheMiss, match="mla-tune compile"):
            plan.executable_for(dataclasses.replace(problem, sinks=True), there)
    again = ahead.build_all(found.jobs)
    assert {b.origin for b in again} <= {"memory", "disk"}


def test_a_compiler_that_fails_costs_one_kernel(cache_dir, monkeypatch):
    there = target.by_name("gfx950")
    problem = DecodeProblem(num_heads=16, kv_lora_rank=128, rope_dim=0)
    (job, *_) = ahead.jobs_of([problem], there).jobs
    broken = dataclasses.replace(job, source=dataclasses.replace(job.source, content="something else"))
    good, bad = sorted(ahead.build_all([job, broken], workers=2), key=lambda built: not built.ok)
    assert good.ok
    assert not bad.ok
    assert broken.source.key[:16] in bad.error or "changed on disk" in bad.error


def test_what_nobody_serves_is_listed():
    there = target.by_name("sm_90")
    found = ahead.jobs_of([DecodeProblem(num_heads=4, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32")], there)
    assert found.jobs == []
    ((what, why),) = found.refused.items()
    assert "on sm_90" in what
    assert "fp32" in why
    assert "decode_blocked_cpu" in why
