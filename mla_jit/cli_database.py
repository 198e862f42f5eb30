"""The verbs of `mla-tune` that work on tuning databases. Each is a function of tuning/database.py with options.

Exit codes: 0 done, 1 something fell short, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_jit import cli_progress
from mla_jit.cli_options import DONE, SHORT, print_json, repeated, verb
from mla_jit.errors import InvalidInput

if TYPE_CHECKING:
    from mla_jit.target import Target
    from mla_jit.tuning import database
    from mla_jit.tuning.rows import Trial

_db = click.option("--db", type=click.Path(path_type=Path), help="The database; the user's if absent.")
_source = click.Path(path_type=Path, exists=True, dir_okay=False)


def _path(db: Path | None) -> Path:
    from mla_jit.tuning import store

    return db if db is not None else store.user_path()


def _percent(context: Any, parameter: Any, text: str) -> float:
    """ "3%" or "0.03"; a bare 3 could be either."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf or (share >= 1 and not text.endswith("%")):
        raise click.BadParameter(f"{text!r} is no share; write 3% or 0.03")
    return share


def _tolerance(default: str) -> Callable[..., Any]:
    text = "How much slower is still as fast. What the spread covers is, too."
    return click.option("--tolerance", callback=_percent, default=default, show_default=True, help=text)


def _row(trial: Trial) -> dict[str, Any]:
    return dataclasses.asdict(trial) | {"variant": trial.variant, "config": dict(trial.config)}


# ------------------------------------------------------------------------------------------------------------- contents


@click.command("show")
@_db
@click.option("--faults", is_flag=True, help="Also list the candidates that were wrong, crashed, hung or did not fit.")
@verb
def show(db: Path | None, faults: bool, as_json: bool) -> int:
    """Show the best config of each tuned shape, its time, and how many candidates went wrong."""
    from mla_jit.tuning import database

    path = _path(db)
    found = database.show(path)
    if as_json:
        best = [_row(trial) for trial in found.best]
        more = {"fault_rows": [_row(trial) for trial in found.faults]} if faults else {}
        print_json({
            "ok": True, "database": path, "trials": found.trials, "best": best, "faults": len(found.faults), **more,
        })  # fmt: skip
        return DONE
    for trial in found.best:
        click.echo(f"{trial.median_us:9.1f} us  {trial.problem}  {trial.device}\n             {trial.config}")
    for trial in found.faults if faults else ():
        click.echo(f"{trial.status}: {trial.config} on {trial.problem}: {trial.note}")
    click.echo(f"{len(found.best)} shapes, {found.trials} trials, {len(found.faults)} faults; {path}")
    return DONE


@click.command("export")
@_db
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@verb
def export(db: Path | None, directory: Path, as_json: bool) -> int:
    """Write the best row of each shape as DIRECTORY/<device>/<op>.jsonl, sorted: the form that the package ships."""
    from mla_jit.tuning import database

    files = database.export(_path(db), directory)
    if as_json:
        print_json({"ok": True, "files": {str(path): count for path, count in files.items()}})
        return DONE
    for path, count in files.items():
        click.echo(f"{count} rows  {path}")
    if not files:
        click.echo("no rows, no files")
    return DONE


# --------------------------------------------------------------------------------------------------------------- adding


@click.command("merge")
@_db
@click.argument("other", nargs=-1, required=True, type=_source)
@verb
def merge(db: Path | None, other: tuple[Path, ...], as_json: bool) -> int:
    """Add the trials of OTHER databases to ours: all are kept, none twice, in any order the same."""
    from mla_jit.tuning import database

    return _added(_path(db), database.merge(_path(db), other), as_json)


@click.command("import")
@_db
@click.argument("file", nargs=-1, required=True, type=_source)
@verb
def import_(db: Path | None, file: tuple[Path, ...], as_json: bool) -> int:
    """Add the rows of .jsonl FILEs, or of other databases, as `imported`: measured elsewhere.

    Nothing is added if any line is bad. Rows that this very database has measured are left out.
    """
    from mla_jit.tuning import database

    return _added(_path(db), database.import_rows(_path(db), file), as_json)


def _added(path: Path, found: database.Added, as_json: bool) -> int:
    if as_json:
        print_json({"ok": True, "database": path, "read": found.read, "added": found.added})
    else:
        click.echo(f"{found.read} trials read, {found.added} added; {path}")
    return DONE


# ------------------------------------------------------------------------------------------------------------ comparing


@click.command("compare")
@click.argument("a", type=_source)
@click.argument("b", type=_source)
@_tolerance("3%")
@verb
def compare(a: Path, b: Path, tolerance: float, as_json: bool) -> int:
    """Compare the best times of two databases or .jsonl files, shape by shape.

    Exit code 1 if B is slower than A on any shape, beyond the tolerance and beyond the spread, or if they have no shape
    in common. Predicted rows are no times and are left out.
    """
    from mla_jit.tuning import database

    found = database.compare(a, b, tolerance=tolerance)
    if as_json:
        pairs = [
            {"problem": p.a.problem.fields(), "target": p.a.target, "device": p.a.device, "a": _row(p.a),
             "b": _row(p.b), "ratio": p.ratio, "slower": p.slower}
            for p in found.pairs
        ]  # fmt: skip
        print_json({
            "ok": found.ok, "tolerance": tolerance, "geometric_mean": found.geometric_mean, "slower": len(found.slower),
            "pairs": pairs, "only_a": [_row(t) for t in found.only_a], "only_b": [_row(t) for t in found.only_b],
        })  # fmt: skip
    else:
        _show_comparison(found)
    return DONE if found.ok else SHORT


def _show_comparison(found: database.Comparison) -> None:
    if found.pairs:
        click.echo(f"{'A us':>9}  {'B us':>9}  {'B / A':>6}")
    for pair in found.pairs:
        verdict = "  SLOWER" if pair.slower else ""
        times = f"{pair.a.median_us:9.1f}  {pair.b.median_us:9.1f}  {pair.ratio:6.3f}"
        click.echo(f"{times}  {pair.a.problem}; {pair.a.device}{verdict}")
        if pair.a.config != pair.b.config:
            click.echo(f"    A {pair.a.config}\n    B {pair.b.config}")
    for name, rows in (("A", found.only_a), ("B", found.only_b)):
        for trial in rows:
            click.echo(f"only in {name}: {trial.median_us:.1f} us  {trial.problem}; {trial.device}")
    if found.geometric_mean is None:
        click.echo("nothing compared: A and B have no shape on the same device in common")
        return
    click.echo(
        f"{len(found.pairs)} shapes, geometric mean of B / A {found.geometric_mean:.3f}; {len(found.slower)} slower in "
        f"B, {len(found.only_a)} only in A, {len(found.only_b)} only in B"
    )


@click.command("diff")
@click.argument("a", type=_source)
@click.argument("b", type=_source)
@verb
def diff(a: Path, b: Path, as_json: bool) -> int:
    """Show in which rows two databases or .jsonl files differ: - only in A, + only in B. Exit code 1 if they do.

    First the problems whose best config is another one, then the rows themselves. The same text for the same rows.
    """
    from mla_jit.tuning import database

    found = database.diff(a, b)
    if as_json:
        print_json({
            "ok": found.equal, "only_a": [_row(t) for t in found.only_a], "only_b": [_row(t) for t in found.only_b],
            "changed_best": [{"a": _row(mine), "b": _row(theirs)} for mine, theirs in found.changed],
        })  # fmt: skip
    elif not found.equal:
        click.echo(f"--- {a}\n+++ {b}")
        for line in found.text():
            click.echo(line)
    return DONE if found.equal else SHORT


# -------------------------------------------------------------------------------------------------------------- pruning


@click.command("prune")
@_db
@click.option("--stale", is_flag=True, help="Of another revision of the kernel, or another toolchain, than today's.")
@click.option("--faults", is_flag=True, help="Candidates that were wrong, crashed, hung or did not fit.")
@click.option("--effort", type=click.IntRange(0), help="Of this effort or less: 0 is the search's shortest look.")
@click.option("--device", help="Of this device, by its name as `show` has it.")
@click.option("--older-than", "days", type=click.FloatRange(0), metavar="DAYS", help="Made so many days ago or before.")
@click.option("--dry-run", is_flag=True, help="Only say which.")
@verb
def prune(db: Path | None, stale: bool, faults: bool, effort: int | None, device: str | None, days: float | None,
          dry_run: bool, as_json: bool) -> int:  # fmt: skip
    """Remove trials from a database: those that are all that is asked for.

    At least one condition is needed. Candidates that once ended a worker stay known in the .quarantine file beside it.
    """
    from mla_jit.tuning import database

    path = _path(db)
    selection = database.Selection(stale, faults, effort, device, days)
    if not selection:
        raise InvalidInput("say which trials: --stale, --faults, --effort, --device or --older-than")
    found = database.prune(path, selection, dry_run=dry_run)
    if as_json:
        print_json({
            "ok": True, "database": path, "dry_run": dry_run, "removed": [_row(t) for t in found.removed],
            "best_removed": [_row(t) for t in found.lost], "kept": found.kept, "note": found.note,
        })  # fmt: skip
    else:
        _show_pruned(found, path, dry_run)
    return DONE


def _show_pruned(found: database.Pruned, path: Path, dry_run: bool) -> None:
    lost = {(trial.problem, trial.device) for trial in found.lost}
    counts = Counter((trial.problem, trial.device) for trial in found.removed)
    for (problem, device), count in counts.items():
        best = ", its best among them" if (problem, device) in lost else ""
        click.echo(f"{count:6} trials  {problem}; {device}{best}")
    what = "would go" if dry_run else "removed"
    click.echo(f"{len(found.removed)} trials {what}, {found.kept} stay; {path}")
    if found.note:
        click.echo(f"the file keeps its size: {found.note}", err=True)


# ------------------------------------------------------------------------------------------------------------ verifying


@click.command("verify")
@_db
@click.option("--shipped", is_flag=True, help="The rows that ship with the package, instead of a database's.")
@click.option("--limit", type=click.IntRange(1), help="So many rows at most, spread over all shapes.")
@_tolerance("10%")
@repeated("--gpus", int, "Indices of the GPUs that share the rows.", default=("0",), show_default="0")
@click.option("--timeout", type=click.FloatRange(1), default=60.0, show_default=True, help="Seconds a row.")
@verb
def verify(db: Path | None, shipped: bool, limit: int | None, tolerance: float, gpus: tuple[int, ...], timeout: float,
           as_json: bool) -> int:  # fmt: skip
    """Check and time the best rows again on this machine, each as it was timed before. Stores nothing.

    Exit code 1 if a row is wrong, fails, or is slower than stored beyond the tolerance and the spread; or if there is
    none to verify. Rows of other devices and predicted ones are counted, not run.
    """
    from mla_jit.tuning import database, pool

    if shipped and db is not None:
        raise InvalidInput("give either --db or --shipped")
    there, devices = _devices(gpus)
    todo = database.verifiable(None if shipped else _path(db), there, limit)
    done: list[database.Verified] = []
    interrupted = False
    with pool.Pool(devices) as workers, cli_progress.advancing(len(todo.rows), as_json) as advance:
        try:
            for row in database.verify(todo.rows, devices, workers, tolerance=tolerance, timeout_s=timeout):
                done.append(row)
                advance(_verified(row))
        except KeyboardInterrupt:
            interrupted = True
    bad = [row for row in done if not row.ok]
    ok = bool(done) and not bad and not interrupted
    if as_json:
        print_json({
            "ok": ok, "target": there.name, "device": there.device, "tolerance": tolerance,
            "interrupted": interrupted, "rows": [_verified_json(row) for row in done], "regressions": len(bad),
            "elsewhere": todo.elsewhere, "predicted": todo.predicted, "left_out": todo.left_out,
        })  # fmt: skip
        return DONE if ok else SHORT
    for row in bad:
        click.echo(_verified(row))
    if not todo.rows:
        click.echo(f"nothing to verify on {there.device} ({there.name})")
    click.echo(
        f"{len(done)} of {len(todo.rows)} rows verified, {len(bad)} regressions; skipped {todo.elsewhere} of other "
        f"devices, {todo.predicted} predicted, {todo.left_out} beyond the limit"
    )
    return DONE if ok else SHORT


def _devices(gpus: Iterable[int]) -> tuple[Target, list[str]]:
    """This machine's target, and the devices that measure; InvalidInput for GPUs that are not of one kind."""
    from mla_jit import target as targets

    there = targets.here()
    if there.runtime in ("cpu", "host"):
        return there, ["cpu"]
    import torch

    count = torch.cuda.device_count()
    if not gpus or not all(0 <= index < count for index in gpus):
        raise InvalidInput(f"--gpus is {','.join(map(str, gpus)) or 'empty'}; this process sees {count}, from 0")
    found = {f"cuda:{index}": targets.of_device("cuda", index) for index in gpus}
    there, *others = found.values()
    for other in others:
        if (other.name, other.device) != (there.name, there.device):
            raise InvalidInput(f"{there.device} and {other.device} have different rows; verify each kind by itself")
    return there, list(found)


def _verified(row: database.Verified) -> str:
    stored = f"stored {row.trial.median_us:.1f} us"
    verdict = "ok" if row.ok else "SLOWER" if row.slower else row.now.status.upper()
    if row.now.median_us is None:
        return f"{verdict} {row.trial.problem}: {stored}; {row.now.note}; {row.trial.config}"
    return f"{verdict} {row.trial.problem}: {row.now.median_us:.1f} us, {stored} ({row.ratio:.3f}); {row.trial.config}"


def _verified_json(row: database.Verified) -> dict[str, Any]:
    return {
        "problem": row.trial.problem.fields(), "variant": row.trial.variant, "config": dict(row.trial.config),
        "device": row.device, "stored_us": row.trial.median_us, "stored_spread_us": row.trial.spread_us,
        "ok": row.ok, "status": row.now.status, "slower": row.slower, "now_us": row.now.median_us,
        "now_spread_us": row.now.spread_us, "rel_l2": row.now.rel_l2, "ratio": row.ratio, "note": row.now.note,
    }  # fmt: skip


VERBS = (show, export, merge, import_, compare, diff, prune, verify)
