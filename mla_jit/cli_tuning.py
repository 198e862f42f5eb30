"""The verbs of `mla-tune` that tune: plan, run. Each is a library function's.

Exit codes: 0 done, 1 something fell short, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_jit.cli_options import DONE, SHORT, positive, print_json, repeated, verb

if TYPE_CHECKING:
    from mla_jit.problem import DecodeProblem
    from mla_jit.target import Target
    from mla_jit.tuning import sweep

# What says which shapes; `plan` and `run` take the same.
_SHAPES = (
    repeated("--model", str, "A row of configs/models.yaml.", required=True),
    repeated("--tp", positive, "Tensor-parallel ranks that share the heads.", default=("1",), show_default="1"),
    repeated("--dtype", str, "bf16, fp16, fp8, fp8xfp8, or QxCACHE; the model's if absent."),
    repeated("--batch", positive, "Sequences a call.", default=("1,4,16,64,128",), show_default="1,4,16,64,128"),
    repeated(
        "--kv-len", positive, "Tokens a sequence.", default=("1024,4096,16384,65536",),
        show_default="1024,4096,16384,65536",
    ),
    repeated("--q-len", positive, "Query tokens a sequence.", default=("1",), show_default="1"),
    click.option("--page-size", type=click.IntRange(1), default=64, show_default=True, help="Tokens a page."),
)  # fmt: skip


def _shapes(command: Any) -> Any:
    for option in reversed(_SHAPES):
        command = option(command)
    return command


def _problems(target: Target, options: dict[str, Any], memory_bytes: int | None) -> list[DecodeProblem]:
    from mla_jit import models
    from mla_jit.tuning import sweep

    wanted = [(models.by_name(name), tp) for name in options["model"] for tp in options["tp"]]
    return sweep.shapes(
        wanted, target, dtypes=options["dtype"] or None, batches=options["batch"], kv_lens=options["kv_len"],
        q_lens=options["q_len"], page_size=options["page_size"], memory_bytes=memory_bytes,
    )  # fmt: skip


@click.command("plan")
@click.option("--target", help="A row of configs/targets.yaml; this machine's if absent. Needs no GPU.")
@_shapes
@verb
def plan(target: str | None, as_json: bool, **options: Any) -> int:
    """Show what `run` would tune, without doing it: the shapes, each once, and how many configs each has.

    Models with the same local heads and dims share their shapes.
    """
    from mla_jit import target as targets
    from mla_jit.tuning import sweep

    there = targets.by_name(target) if target is not None else targets.here()
    found = [(problem, len(sweep.candidates(problem, there))) for problem in _problems(there, options, None)]
    ok = bool(found) and all(count for _, count in found)
    if as_json:
        rows = [{"problem": problem.fields(), "candidates": count} for problem, count in found]
        print_json({"ok": ok, "target": there.name, "device": there.device, "shapes": rows})
        return DONE if ok else SHORT
    click.echo(f"{len(found)} shapes for {there.name} ({there.device})")
    for problem, count in found:
        click.echo(f"  {count:5} configs  {problem}")
    return DONE if ok else SHORT


@click.command("run")
@_shapes
@click.option("--budget", default="10m", show_default=True, help="Wall-clock limit of the sweep: 90s, 30m, 2h.")
@click.option("--search", "how", type=click.Choice(["auto", "exhaustive"]), default="auto", show_default=True)
@click.option("--gpus", default="0", show_default=True, help="Indices of the GPUs that share the shapes: 0,1.")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Skip what the database has finished.")
@click.option("--timeout", type=click.FloatRange(1), default=60.0, show_default=True, help="Seconds a candidate.")
@click.option("--db", type=click.Path(path_type=Path), help="The database; the user's (MLA_JIT_TUNING_DB) if absent.")
@verb
def run(budget: str, how: str, gpus: str, resume: bool, timeout: float, db: Path | None, as_json: bool,
        **options: Any) -> int:  # fmt: skip
    """Tune shapes on this machine's GPU (or its CPU), and store every trial. Later calls use the best by themselves.

    Ctrl-C keeps what was measured; the same command goes on from there.
    """
    from mla_jit import target as targets
    from mla_jit.tuning import pool, store, sweep

    there = targets.here()
    on_gpu = there.runtime not in ("cpu", "host")
    devices = [f"cuda:{index.strip()}" for index in gpus.split(",")] if on_gpu else ["cpu"]
    problems = _problems(there, options, _memory_bytes(there))
    path = db if db is not None else store.user_path()
    rows: list[sweep.Finished] = []
    interrupted = False
    workers = pool.Pool(devices, quarantine=path.with_suffix(".quarantine"))
    with store.Store(path) as database, workers, _bar(len(problems), as_json) as advance:
        try:
            for done in sweep.run(
                problems, there, devices, workers, database, budget_s=_seconds(budget), how=how, resume=resume,
                timeout_s=timeout, command=" ".join(["mla-tune", *sys.argv[1:]]),
            ):  # fmt: skip
                rows.append(done)
                advance(_finished(done))
        except KeyboardInterrupt:
            interrupted = True
    outcomes = [row.outcome for row in rows if row.outcome is not None]
    short = interrupted or len(rows) < len(problems)
    short = short or any(found.stopped != "done" or found.median_us is None for found in outcomes)
    if as_json:
        print_json({"ok": not short, "database": path, "shapes": [_finished_json(row) for row in rows]})
    else:
        tuned = sum(row.outcome is not None for row in rows)
        click.echo(
            f"{tuned} shapes tuned, {len(rows) - tuned} finished before, {len(problems) - len(rows)} not reached"
        )
        click.echo(f"database {path}")
    return SHORT if short else DONE


def _memory_bytes(there: Target) -> int | None:
    """A third of the device's memory: a shape's cache must leave room for the inputs' rotation."""
    from mla_jit import target as targets

    total = targets.memory_bytes() if there.runtime not in ("cpu", "host") else None
    return 1 << 31 if total is None else total // 3


def _seconds(text: str) -> float:
    """ "90s", "30m", "2h", or seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        raise click.BadParameter(f"{text!r} is no time; write 90s, 30m or 2h", param_hint="--budget") from None


@contextlib.contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def advance(text: str) -> None:
            progress.update(task, advance=1)
            if not quiet:
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield advance


def _finished(done: sweep.Finished) -> str:
    if done.outcome is None:
        return f"{done.problem}: finished before"
    found = done.outcome
    if found.median_us is None:
        first = f"; {found.faults[0][1]}: {found.faults[0][2]}" if found.faults else ""
        return f"{done.problem}: nothing measured ({found.stopped}); {found.why}{first}"
    gain = f", default {found.default_us:.1f}" if found.default_us is not None else ""
    return (
        f"{done.problem}: {found.median_us:.1f} us{gain}; {found.explored} configs in {done.seconds:.1f} s, "
        f"{len(found.faults)} faulty; {found.winner}"
    )


def _finished_json(done: sweep.Finished) -> dict[str, Any]:
    row: dict[str, Any] = {"problem": done.problem.fields(), "device": done.device, "seconds": done.seconds}
    if (found := done.outcome) is None:
        return {**row, "finished_before": True}
    return {
        **row, "finished_before": False, "winner": dict(found.winner), "variant": found.winner.variant,
        "median_us": found.median_us,
        "default_us": found.default_us, "explored": found.explored, "stopped": found.stopped, "why": found.why,
        "faults": [{"config": str(config), "status": status, "note": note} for config, status, note in found.faults],
    }  # fmt: skip


VERBS = (plan, run)
