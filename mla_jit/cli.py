"""`mla-tune`: the command line. Each verb is a library function with options, and prints what it returns.

Exit codes: 0 done, 1 something fell short, 2 wrong usage. `--json` prints one JSON document on stdout and nothing else
there. Nothing heavy is imported before a verb needs it: `mla-tune --help` loads neither torch nor triton.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_jit import __version__, cli_bench, cli_database, cli_predict, cli_report, cli_tuning
from mla_jit.cli_options import DONE, SHORT, positive, print_json, repeated, verb
from mla_jit.errors import InvalidInput

if TYPE_CHECKING:
    from mla_jit import ahead, explain, quickstart
    from mla_jit.problem import DecodeProblem, PrefillProblem
    from mla_jit.target import Target


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mla-tune")
def main() -> None:
    """Compiles, explains and looks after the kernels of mla_jit."""


# ---------------------------------------------------------------------------------------------------------- quickstart


@main.command("quickstart")
@click.option("--cross/--no-cross", default=True, show_default=True, help="Cross-compile for other architectures too.")
@verb
def _quickstart(cross: bool, as_json: bool) -> int:
    """Run one decode call here, judge it, and show where its time went.

    The call is checked against the reference, made again from the cache, and its kernels are cross-compiled for other
    architectures. Needs no GPU. Uses a cache directory of its own, so that the first call always compiles.
    """
    from mla_jit import quickstart

    report = quickstart.run(cross=cross, say=lambda text: click.echo(f"… {text}", err=True))
    if as_json:
        print_json(report.to_json())
    else:
        _show_quickstart(report)
    return DONE if report.ok else SHORT


def _show_quickstart(report: quickstart.Report) -> None:
    found = report.accuracy
    click.echo(f"\n{report.problem}\non {report.device} ({report.target}) by {report.variant}\n  {report.config}")
    click.echo(
        f"  against the reference, worst row: relative L2 {found['rel_l2']:.1e} (limit {found['rel_l2_limit']:.0e}), "
        f"LSE {found['lse_error']:.1e} (limit {found['lse_limit']:.0e})"
    )
    click.echo("\nwhere the time went, ms")
    kernels = ", ".join(report.origins) or "no kernels to compile"
    click.echo(f"  first call   {_times(report.times_s)}   ({kernels})")
    again = ", ".join(report.again_origins) or "no kernels to load"
    click.echo(f"  second call  {_times(report.again_s)}   ({again})")
    if report.kernels:
        click.echo("\ncross-compiled, no GPU needed")
        rows = [
            (
                k.target,
                k.name,
                k.registers,
                k.spill_bytes,
                k.smem_bytes,
                f"{k.compile_s:.2f}",
                f"{k.cached_s * 1e3:.2f}",
            )
            for k in report.kernels
        ]
        _table(("target", "kernel", "registers", "spilled B", "shared B", "compile s", "cached ms"), rows)
    for fault in report.faults:
        click.echo(f"FAULT {fault}")
    click.echo(f"\n{'all well' if report.ok else 'something fell short'}, {report.total_s:.1f} s in all")


def _times(times_s: dict[str, float]) -> str:
    return "  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in times_s.items())


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        click.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# ------------------------------------------------------------------------------------------------------------- compile


@main.command("compile")
@repeated("--target", str, "A row of configs/targets.yaml; this machine's if absent.")
@click.option("--model", required=True, help="A row of configs/models.yaml.")
@click.option(
    "--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel ranks that share the heads."
)
@repeated(
    "--dtype", str, "bf16, fp16, fp8 (a cache of the target's fp8, q bf16), fp8xfp8, or QxCACHE; the model's if absent."
)
@repeated("--page-size", positive, "Tokens a page.", default=("64",), show_default=True)
@repeated(
    "--q-len",
    positive,
    "Query tokens a sequence (the bound of a ragged batch).",
    default=("1", "2"),
    show_default=True,
)
@repeated(
    "--layout",
    str,
    "The cache as joint (one tensor), split (ckv, kpe), or three (fp8 ckv, kv_scales, kpe).",
    default=("joint",),
    show_default=True,
)
@repeated("--paging", str, "table, csr (no seq_lens), csr+lens.", default=("table", "csr"), show_default=True)
@click.option(
    "--lse",
    type=click.Choice(["both", "yes", "no"]),
    default="both",
    show_default=True,
    help="Whether calls want the LSE.",
)
@click.option(
    "--ragged",
    type=click.Choice(["both", "yes", "no"]),
    default="both",
    show_default=True,
    help="Whether calls pass qo_indptr.",
)
@click.option(
    "--scales",
    type=click.Choice(["auto", "none", "all"]),
    default="auto",
    show_default=True,
    help="Scales passed as device tensors: none, all whatever the dtypes, or (auto) none and those of fp8 operands.",
)
@click.option("--causal/--no-causal", default=True, show_default=True, help="Matters from two query tokens on.")
@click.option(
    "--batch-invariant/--no-batch-invariant", default=False, show_default=True, help="Whether calls ask for it."
)
@click.option(
    "--scheduler",
    type=click.Choice(["auto", "persistent"]),
    multiple=True,
    default=("auto",),
    show_default=True,
    help="What calls ask for; persistent: with lists of their own and with shared ones, AITER's metadata among them.",
)
@click.option("--max-batch", type=click.IntRange(1), default=1024, show_default=True, help="Most sequences a call.")
@click.option(
    "--op",
    type=click.Choice(["decode", "prefill", "all"]),
    default="decode",
    show_default=True,
    help="Which op's kernels; prefill: un-absorbed, causal and not, by both schedulers, and merge_state.",
)
@click.option(
    "--sms",
    type=click.IntRange(1),
    help="SMs or CUs of the device, where it is not the product that the target's row names.",
)
@click.option("--max-kv-len", type=click.IntRange(1), help="Longest sequence; the model's if absent.")
@click.option("--jobs", "-j", type=click.IntRange(1), help="Compilers at a time; the usable CPUs if absent.")
@click.option("--verbose", "-v", is_flag=True, help="List every kernel.")
@verb
def _compile(
    target: tuple[str, ...], model: str, tp: int, dtype: tuple[str, ...], page_size: tuple[int, ...],
    q_len: tuple[int, ...], layout: tuple[str, ...], paging: tuple[str, ...], lse: str, ragged: str, scales: str,
    causal: bool,
    batch_invariant: bool, scheduler: tuple[str, ...], max_batch: int, op: str, sms: int | None,
    max_kv_len: int | None, jobs: int | None, verbose: bool, as_json: bool,
) -> int:  # fmt: skip
    """Compile every kernel that serving a model needs, into the cache. Needs no GPU.

    Afterwards a process in strict mode with the same Triton finds a kernel for each call of the given properties,
    whatever the batch and the lengths up to the limits.
    """
    from mla_jit import ahead, models
    from mla_jit import target as targets

    which = {"both": (False, True), "yes": (True,), "no": (False,)}
    row = models.by_name(model)
    plans: list[ahead.Plan] = []
    for there in [targets.by_name(name) for name in target] or [targets.here()]:
        there = there if sms is None else dataclasses.replace(there, sms=sms)
        if op != "decode":
            prompts = models.prefill_problems(row, there, tp=tp, dtypes=dtype or None, lse=which[lse], scales=scales)
            plans.append(ahead.jobs_of(ahead.prompts_of_any_size(prompts, max_batch=max_batch), there))
            plans.append(ahead.jobs_of(models.merge_problems(row, there, tp=tp, dtypes=dtype or None), there))
        if op == "prefill":
            continue
        for asked, planned in ((s, p) for s in dict.fromkeys(scheduler) for p in models.PLANNED[s]):
            kinds = models.decode_problems(
                row, there, tp=tp, dtypes=dtype or None, page_sizes=page_size, q_lens=q_len, pagings=paging,
                layouts=layout, lse=which[lse], ragged=which[ragged], scales=scales, causal=causal,
                batch_invariant=batch_invariant, scheduler=asked, planned=planned,
            )  # fmt: skip
            sizes = ahead.of_any_size(kinds, there, max_batch=max_batch, max_kv_len=max_kv_len)
            plans.append(ahead.jobs_of(sizes, there))
    started = time.perf_counter()
    todo = [job for plan in plans for job in plan.jobs]
    built = _with_progress(todo, jobs)
    refused = {what: why for plan in plans for what, why in plan.refused.items()}
    ok = not refused and all(done.ok for done in built)
    seconds = time.perf_counter() - started
    if as_json:
        kernels = [_kernel_json(done) for done in built]
        problems_seen = sum(plan.problems for plan in plans)
        print_json(
            {
                "ok": ok,
                "model": row.name,
                "problems": problems_seen,
                "refused": refused,
                "kernels": kernels,
                "seconds": seconds,
            }
        )
    else:
        _show_compiled(built, refused, seconds, verbose)
    return DONE if ok else SHORT


def _with_progress(jobs: list[ahead.Job], workers: int | None) -> list[ahead.Built]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from mla_jit import ahead

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("compiling", total=len(jobs))

        def on_done(done: ahead.Built) -> None:
            progress.update(task, advance=1, description=f"{done.job.target} {done.job.source.name}")

        return ahead.build_all(jobs, workers=workers, on_done=on_done)


def _kernel_json(done: ahead.Built) -> dict[str, Any]:
    from mla_jit.compile import cache

    head = {"target": done.job.target, "name": done.job.source.name, "key": done.job.source.key, "origin": done.origin}
    a = done.artifact
    if a is None:
        return {**head, "ok": False, "error": done.error, "problem": str(done.job.problem)}
    return {
        **head, "ok": True, "path": cache.path_of(a.key), "registers": a.registers, "spill_bytes": a.spill_bytes,
        "smem_bytes": a.smem_bytes, "threads": a.threads, "size_bytes": len(a.binary), "compile_s": a.compile_seconds,
    }  # fmt: skip


def _show_compiled(built: list[ahead.Built], refused: dict[str, str], seconds: float, verbose: bool) -> None:
    from mla_jit.compile import cache

    good = [(done, done.artifact) for done in built if done.artifact is not None]
    if verbose and good:
        rows = [
            (
                done.job.target,
                a.name,
                done.origin,
                a.registers,
                a.spill_bytes,
                a.smem_bytes,
                f"{a.compile_seconds:.2f}",
                a.key[:16],
            )
            for done, a in sorted(good, key=lambda pair: (pair[0].job.target, pair[1].name, pair[1].key))
        ]
        _table(("target", "kernel", "from", "registers", "spilled B", "shared B", "compile s", "key"), rows)
    for done in built:
        if not done.ok:
            click.echo(f"FAILED {done.job.target} for {done.job.problem}: {done.error}")
    for what, why in refused.items():
        click.echo(f"REFUSED {what}: {why}")
    for name in dict.fromkeys(done.job.target for done in built):
        here = [done for done in built if done.job.target == name]
        compiled = sum(done.origin == "compiled" for done in here)
        failed = sum(not done.ok for done in here)
        click.echo(
            f"{name}: {len(here)} kernels: {compiled} compiled, {len(here) - compiled - failed} in the cache before, "
            f"{failed} failed"
        )
    if not built and not refused:
        click.echo("nothing to compile: this target is served without kernels")
    click.echo(f"{seconds:.1f} s; cache {cache.root()}")


# ------------------------------------------------------------------------------------------------------------- explain


@main.command("explain")
@click.option("--target", help="A row of configs/targets.yaml; this machine's if absent.")
@click.option("--model", help="A row of configs/models.yaml, which gives heads and dims.")
@click.option(
    "--tp",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Tensor-parallel ranks that share the model's heads.",
)
@click.option("--heads", type=click.IntRange(1), help="Query heads, without --model.")
@click.option("--kv-heads", type=click.IntRange(1), default=1, show_default=True, help="KV heads.")
@click.option("--kv-lora-rank", type=click.IntRange(16), help="C, width of the latent [512].")
@click.option("--rope-dim", type=click.IntRange(0), help="R, the rotary part [64].")
@click.option("--dtype", default="bf16", show_default=True, help="bf16, fp16, fp32, fp8, fp8xfp8, or QxCACHE.")
@click.option("--page-size", type=click.IntRange(1), default=64, show_default=True, help="Tokens a page.")
@click.option("--layout", default="joint", show_default=True, help="joint, split, or three (ckv, kv_scales, kpe).")
@click.option("--q-len", type=click.IntRange(1), default=1, show_default=True, help="Query tokens a sequence.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option(
    "--max-kv-len",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="The bound of the lengths that the host knows.",
)
@click.option("--hinted", is_flag=True, help="The call passes --max-kv-len; without this it is the table's capacity.")
@click.option("--paging", type=click.Choice(["table", "csr", "csr+lens"]), default="table", show_default=True)
@click.option("--num-kv-splits", type=click.IntRange(1), help="Asked-for split slots; the plan's choice if absent.")
@click.option("--batch-invariant", is_flag=True, help="Cut sequences independently of the batch.")
@click.option("--lse", is_flag=True, help="The call wants the LSE.")
@click.option("--ragged", is_flag=True, help="The call passes qo_indptr.")
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--soft-cap", is_flag=True, help="A logit cap is given.")
@click.option("--sinks", is_flag=True, help="Attention sinks are given.")
@click.option("--kv-scale", is_flag=True, help="kv_scale is a device tensor.")
@click.option("--q-scale", is_flag=True, help="q_scale is a device tensor.")
@click.option(
    "--prefill", is_flag=True, help="A prompt, un-absorbed: --q-len and --max-kv-len a sequence, the model's own dims."
)
@click.option("--build/--no-build", default=True, show_default=True, help="Compile kernels that are not in the cache.")
@verb
def _explain(target: str | None, build: bool, as_json: bool, **options: Any) -> int:
    """Say which kernel serves a problem, with which config, from where, and why no other.

    Of a config from the tuning database: its time beside the default's and the runner-up's, and where the row is of
    another problem, how the two differ.
    """
    from mla_jit import explain
    from mla_jit import target as targets

    there = targets.by_name(target) if target is not None else targets.here()
    asked = _prompt(there, **options) if options.pop("prefill") else _problem(there, **options)
    found = explain.explain(asked, there, build=build)
    if as_json:
        print_json(found.to_json())
    else:
        _show_explanation(found)
    return DONE if found.ok else SHORT


def _prompt(
    there: Target, model: str | None, tp: int, q_len: int, batch: int, max_kv_len: int, causal: bool, lse: bool,
    soft_cap: bool, dtype: str, q_scale: bool, kv_scale: bool, **_: Any,
) -> PrefillProblem:  # fmt: skip
    from mla_jit import models
    from mla_jit.dtypes import DTYPES
    from mla_jit.problem import PrefillProblem

    if model is None:
        raise InvalidInput("--prefill needs --model, which gives heads and dims")
    row = models.by_name(model)
    q, kv = models.dtypes_on(dtype, there)
    return PrefillProblem(
        num_heads=row.local_heads(tp), num_kv_heads=row.local_heads(tp), qk_dim=row.nope_dim + row.rope_dim,
        v_dim=row.v_dim, q_dtype=q, kv_dtype=kv, out_dtype="bf16" if DTYPES[q].bits == 8 else q, causal=causal,
        soft_cap=soft_cap, lse=lse, q_scale=q_scale, k_scale=kv_scale, v_scale=kv_scale,
        **PrefillProblem.sizes(batch, q_len, max_kv_len),
    )  # fmt: skip


def _problem(
    there: Target, model: str | None, tp: int, heads: int | None, kv_heads: int, kv_lora_rank: int | None,
    rope_dim: int | None, dtype: str, paging: str, **fields: Any,
) -> DecodeProblem:  # fmt: skip
    from mla_jit import models
    from mla_jit.dtypes import DTYPES
    from mla_jit.problem import DecodeProblem, bucket

    if (model is None) == (heads is None):
        raise InvalidInput("give either --model or --heads")
    row = None if model is None else models.by_name(model)
    q, cache = models.dtypes_on(dtype, there)
    fields["max_kv_len"] = bucket(fields["max_kv_len"])  # as a call does
    return DecodeProblem(
        num_heads=row.local_heads(tp) if row is not None else heads or 1,
        num_kv_heads=kv_heads,
        kv_lora_rank=kv_lora_rank or (row.kv_lora_rank if row is not None else 512),
        rope_dim=rope_dim if rope_dim is not None else row.rope_dim if row is not None else 64,
        q_dtype=q, kv_dtype=cache, out_dtype="bf16" if DTYPES[q].bits == 8 else q,
        paging=paging.partition("+")[0], has_lens=paging != "csr", **fields,
    )  # fmt: skip


def _show_explanation(found: Any) -> None:
    click.echo(f"{found.problem}\non {found.target} ({found.device})\n")
    click.echo(f"variant  {found.variant} (backend {found.backend})")
    click.echo(f"config   {', '.join(f'{k}={v}' for k, v in found.config.items())}")
    click.echo(f"from     {found.provenance}{': ' if found.why else ''}{found.why}")
    if found.tuned is not None:
        _show_tuned(found.tuned)
    if found.changes:
        click.echo(f"unlike the default: {_differing(found.changes)}")
    cost = found.cost
    click.echo(
        f"model    {cost.bytes / 1e6:.2f} MB, {cost.flops / 1e9:.2f} GFLOP, {cost.programs} programs, "
        f"{cost.waves:.2f} waves, {cost.time_us:.1f} us predicted; workspace {found.workspace_bytes} B"
    )
    for kernel in found.kernels:
        click.echo(f"\nkernel   {kernel.name}: {kernel.origin}\n  key    {kernel.key}")
        if kernel.registers is not None:
            click.echo(f"  path   {kernel.path or 'in memory only'}")
            click.echo(
                f"  uses   {kernel.registers} registers, {kernel.spill_bytes} B spilled, {kernel.smem_bytes} B shared "
                f"memory, {kernel.threads} threads; {kernel.size_bytes} B of code, compiled in {kernel.compile_s:.2f} s"
            )
        if kernel.error:
            click.echo(f"  ERROR  {kernel.error}")
    if not found.kernels:
        click.echo("kernels  none: the variant runs on the host")
    for name, reason in found.rejected.items():
        click.echo(f"\nnot      {name}: {reason}")


def _show_tuned(row: explain.Tuned) -> None:
    made = ", ".join(text for text in (row.created, row.toolchain, f"revision {row.revision}", row.policy) if text)
    click.echo(f"row      {row.source}, {row.file}: {made}{f'; {row.command}' if row.command else ''}")
    if row.differences:
        click.echo(f"  of     {row.problem}\n  where  {_differing(row.differences)}")
    spread = "" if row.taken.spread_us is None else f", spread {row.taken.spread_us:.2f} us"
    click.echo(f"time     {row.taken.median_us:.2f} us {row.provenance}{spread}")
    for name, other in (("default", row.default), ("runner-up", row.runner_up)):
        if other is None:
            click.echo(f"  {name}: no time stored")
            continue
        same = other.effort == row.taken.effort
        ratio = f"{other.median_us / row.taken.median_us:.3f} times as long" if same else f"of effort {other.effort}"
        config = ", ".join(f"{k}={v}" for k, v in other.config.items())
        click.echo(f"  {name}: {other.median_us:.2f} us, {ratio}: {other.variant} {config}")


def _differing(fields: Iterable[explain.Difference]) -> str:
    """ "batch 48 (there 64), page_size 16 (there 64)"."""
    return ", ".join(f"{field.name} {field.here} (there {field.there})" for field in fields)


# ------------------------------------------------------------------------------------------------------------- support


@main.command("support")
@click.option("--markdown", is_flag=True, help="Print the tables as README.md has them.")
@click.option(
    "--prove", is_flag=True, help="Compile every cell, run those of this machine, and write the evidence file."
)
@click.option("--only", multiple=True, help="With --prove: only this target. Repeat for more.")
@verb
def _support(markdown: bool, prove: bool, only: tuple[str, ...], as_json: bool) -> int:
    """Show what is supported: op × dtypes × target × backend.

    Each cell is measured, executed, compiled (and found legal, without hardware), or refused with the reason.
    Refusals are the variants' own; the rest is read from tuning_db/evidence.jsonl, which --prove writes.
    """
    from mla_jit import support

    failures: dict[support.Cell, str] = {}
    cells = support.matrix()
    if prove:
        from mla_jit import target as targets

        wanted = {targets.by_name(name).name for name in only} or set(targets.targets())
        rows, failures = support.prove(cell for cell in cells if cell.target in wanted)
        support.write_evidence(support.merged(support.evidence().values(), rows))
        cells = support.matrix()
    unproven = [cell for cell in cells if cell.state == "unproven"]
    ok = not failures and not unproven
    if as_json:
        failed = [{**asdict(cell), "error": error} for cell, error in failures.items()]
        print_json({"ok": ok, "cells": support.as_json(cells), "failures": failed})
        return DONE if ok else SHORT
    click.echo(support.markdown(cells), nl=False)
    for cell, error in failures.items():
        click.echo(f"FAILED {' '.join(cell.key)}: {error}", err=True)
    if unproven and not markdown:
        click.echo(
            f"{len(unproven)} cells are accepted but nothing was shown of them yet; run mla-tune support --prove",
            err=True,
        )
    return DONE if ok else SHORT


# -------------------------------------------------------------------------------------------------------------- doctor


@main.command("doctor")
@verb
def _doctor(as_json: bool) -> int:
    """Examine this machine: versions, GPU, driver, cache, settings; each fault with its remedy."""
    from mla_jit import doctor

    checks = doctor.examine()
    if as_json:
        print_json(doctor.as_json(checks))
    else:
        doctor.render(checks, click.echo)
    return SHORT if any(check.status == "fault" for check in checks) else DONE


# --------------------------------------------------------------------------------------------------------------- cache


@main.group("cache")
def _cache() -> None:
    """List, verify and clean the kernel cache."""


@_cache.command("ls")
@verb
def _cache_ls(as_json: bool) -> int:
    """List the kernels of all layers."""
    from mla_jit.compile import cache

    entries = cache.entries()
    ok = all(entry.ok for entry in entries)
    if as_json:
        print_json(
            {"ok": ok, "root": cache.root(), "entries": [{**asdict(entry), "ok": entry.ok} for entry in entries]}
        )
        return DONE if ok else SHORT
    rows = [
        (entry.name, entry.isa, entry.key[:16], entry.size_bytes, _day(entry.used), entry.problem or "ok", entry.layer)
        for entry in entries
    ]
    if rows:
        _table(("kernel", "isa", "key", "bytes", "used", "state", "layer"), rows)
    click.echo(
        f"{len(entries)} kernels, {sum(entry.size_bytes for entry in entries) / 1e6:.1f} MB; root {cache.root()}"
    )
    return DONE if ok else SHORT


@_cache.command("verify")
@click.option("--fix", is_flag=True, help="Evict bad entries of the writable root.")
@verb
def _cache_verify(fix: bool, as_json: bool) -> int:
    """Read every entry and compare it with its manifest. Exit code 1 if a bad one remains."""
    from mla_jit.compile import cache

    faults = cache.verify(fix=fix)
    ok = all(fault.fixed for fault in faults)
    if as_json:
        print_json({"ok": ok, "entries": len(cache.entries()), "faults": [asdict(fault) for fault in faults]})
        return DONE if ok else SHORT
    for fault in faults:
        click.echo(f"{'evicted' if fault.fixed else 'BAD'} {fault.path}: {fault.reason}")
    click.echo(f"{len(cache.entries())} kernels in {cache.root()} and its layers, {len(faults)} bad")
    return DONE if ok else SHORT


@_cache.command("gc")
@click.option("--max-age-days", type=click.FloatRange(0), help="Remove what was not used for so long.")
@click.option("--max-mb", type=click.FloatRange(0), help="Then remove the longest unused beyond this size.")
@verb
def _cache_gc(max_age_days: float | None, max_mb: float | None, as_json: bool) -> int:
    """Remove old kernels, and what killed processes left behind."""
    from mla_jit.compile import cache

    max_age_s = None if max_age_days is None else max_age_days * 86400.0
    found = cache.gc(max_age_s, None if max_mb is None else int(max_mb * 1e6))
    if as_json:
        print_json({"ok": True, **asdict(found), "size_bytes": found.size_bytes})
    else:
        click.echo(
            f"removed {len(found.entries)} kernels ({found.size_bytes / 1e6:.1f} MB), {found.staging} abandoned "
            f"writes, {found.locks} abandoned locks"
        )
    return DONE


@_cache.command("clear")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@verb
def _cache_clear(yes: bool, as_json: bool) -> int:
    """Remove all kernels of the writable root."""
    from mla_jit.compile import cache

    root: Path | None = cache.root()
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise InvalidInput(f"this removes every kernel in {root}; pass --yes")
        click.confirm(f"Remove every kernel in {root}?", abort=True)
    removed = cache.clear()
    if as_json:
        print_json({"ok": True, "root": root, "removed": removed})
    else:
        click.echo(f"removed {removed} kernels from {root}")
    return DONE


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


for _command in (*cli_tuning.VERBS, *cli_database.VERBS, cli_report.report, cli_predict.predict, cli_bench.bench):
    main.add_command(_command)

if __name__ == "__main__":
    main()
