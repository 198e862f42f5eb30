"""The verb `mla-tune report`: reads a tuning database and writes the page that `tuning.report` makes of it.

Exit codes: 0 done, 1 nothing to report or no way to write, 2 wrong usage or the extra `report` is not installed.
"""

from __future__ import annotations

from pathlib import Path

import click

from mla_jit.cli_options import DONE, USAGE, print_json, verb
from mla_jit.errors import MlaJitError


@click.command("report")
@click.option(
    "--html", "file", type=click.Path(path_type=Path, dir_okay=False), required=True,
    help="The file to write; what stood there is replaced at once or not at all.",
)  # fmt: skip
@click.option("--db", type=click.Path(path_type=Path), help="The database; the user's if absent.")
@click.option("--device", help='Only the trials of this device: "NVIDIA H200" or nvidia_h200.')
@verb
def report(file: Path, db: Path | None, device: str | None, as_json: bool) -> int:
    """Write a tuning database as one HTML page: roofline, heat maps, gains over the default, all shapes, all faults.

    The page needs no network. It needs the extra `report`: pip install 'mla_jit[report]'.
    """
    try:
        from mla_jit.tuning import report as pages
    except ImportError as error:
        if as_json:
            print_json({"ok": False, "error": "ImportError", "message": str(error)})
        else:
            click.echo(f"ImportError: {error}", err=True)
        return USAGE
    from mla_jit import target
    from mla_jit.tuning import rows, store

    path = db if db is not None else store.user_path()
    with store.Store(path, readonly=True) as database:
        trials, best = list(database.trials()), list(database.best())
    if not trials:
        raise MlaJitError(f"the tuning database {path} has no trials; `mla-tune run` makes some")
    if device is not None:
        there = sorted({trial.device for trial in trials})
        trials, best = ([t for t in some if rows.slug(t.device) == rows.slug(device)] for some in (trials, best))
        if not trials:
            raise MlaJitError(f"the tuning database {path} has no trials of {device!r}; it has {', '.join(there)}")
    _write(file, pages.html(trials, best, target.targets(), database=str(path)))
    shapes = len({(trial.problem, trial.target, trial.device) for trial in trials})
    faults = sum(trial.status != rows.OK for trial in trials)
    if as_json:
        print_json({"ok": True, "file": file, "shapes": shapes, "trials": len(trials), "faults": faults})
    else:
        click.echo(f"{shapes} shapes, {len(trials)} trials, {faults} faults; {file}")
    return DONE


def _write(path: Path, text: str) -> None:
    from mla_jit import resources

    try:
        resources.write_whole(path, text)
    except OSError as error:
        raise MlaJitError(f"the report cannot be written to {path}: {error}; name another file") from error
