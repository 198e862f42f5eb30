"""The verb `mla-tune predict`: rows for devices that nobody has measured, as tuning/predict.py makes them.

Exit codes: 0 done, 1 no shape at all, 2 wrong usage.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_jit import cli_progress, cli_tuning
from mla_jit.cli_options import DONE, SHORT, print_json, verb

if TYPE_CHECKING:
    from mla_jit import ahead
    from mla_jit.target import Target
    from mla_jit.tuning import predict as predictions


@click.command("predict")
@click.option("--target", show_default="this machine's", help="Predict for this row of configs/targets.yaml.")
@cli_tuning._shapes
@click.option(
    "--margin", type=click.FloatRange(0), default=15, show_default=True,
    help="Write what is predicted to be so many per cent faster than the default; 3 at least.",
)  # fmt: skip
@click.option(
    "--kernels", type=click.IntRange(1), default=40, show_default=True,
    help="Compile so many first kernels at most; where they do not suffice, make the rows that gain most.",
)  # fmt: skip
@cli_tuning._jobs
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@verb
def predict(
    target: str | None, margin: float, kernels: int, jobs: int | None, directory: Path, as_json: bool, **options: Any
) -> int:  # fmt: skip
    """Predict which configs are faster than the default, and write them as DIRECTORY/<device>/decode.jsonl.

    An analytic model ranks the candidates; the kernels of the best are really compiled, and their registers, shared
    memory and spills counted. A row is written only where it is well ahead of the default. Needs no GPU. Rows of the
    file that were measured stay; calls prefer them.
    """
    from mla_jit import target as targets
    from mla_jit.tuning import predict as predictions

    there = targets.by_name(target) if target is not None else targets.here()
    problems = cli_tuning._problems(there, options, None)
    path = predictions.path_of(directory, there)
    kept = predictions.beside(path, problems, there)
    with cli_progress.advancing(kernels, as_json) as advance:
        found = predictions.predict(
            problems, there, margin=margin / 100, most_kernels=kernels, workers=jobs, kept=kept,
            command=" ".join(["mla-tune", *sys.argv[1:]]), on_built=lambda built: advance(_built(built)),
        )  # fmt: skip
    predictions.write(path, found.trials, kept)
    if as_json:
        print_json(
            {"ok": bool(problems), **_json(found, there), "shapes": len(problems), "kept": len(kept), "file": path}
        )
    else:
        _show(found, there, len(problems), len(kept), path)
    return DONE if problems else SHORT


def _built(built: ahead.Built) -> str:
    source, made = built.job.source, built.artifact
    if made is None:
        return built.error
    return (
        f"{source.name} {source.key[:16]}: {made.registers} registers, {made.spill_bytes} B spilled, "
        f"{made.smem_bytes} B shared memory"
    )


def _gain(found: predictions.Prediction) -> float | None:
    """The default's time over the prediction's, geometric mean; None without rows."""
    logs = [math.log(row.default_us / row.median_us) for row in found.trials if row.default_us and row.median_us]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _json(found: predictions.Prediction, there: Target) -> dict[str, Any]:
    rows = [
        {
            "problem": row.problem.fields(), "variant": row.variant, "config": dict(row.config),
            "median_us": row.median_us, "default_us": row.default_us,
        }
        for row in found.trials
    ]  # fmt: skip
    return {
        "target": there.name, "device": there.device, "rows": rows, "gain": _gain(found), "kernels": found.kernels,
        "combines": found.combines, "faults": [{"kernel": name, "error": error} for name, error in found.faults],
        "without": [{"problem": problem.fields(), "why": why} for problem, why in found.without.items()],
    }  # fmt: skip


def _show(found: predictions.Prediction, there: Target, shapes: int, kept: int, path: Path) -> None:
    for row in found.trials:
        click.echo(f"{row.median_us:9.1f} us, default {row.default_us:.1f}  {row.problem}\n             {row.config}")
    for problem, why in found.without.items():
        click.echo(f"no row for {problem}: {why}")
    gain = _gain(found)
    claim = "" if gain is None else f", by the model {gain:.2f} times as fast as the default (geometric mean)"
    click.echo(
        f"{len(found.trials)} of {shapes} shapes for {there.name} ({there.device}){claim}; {found.kernels} first "
        f"kernels and {found.combines} combines compiled, {len(found.faults)} not legal; {kept} rows kept; {path}"
    )
