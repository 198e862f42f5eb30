"""The rows that ship with the package: tuning_db/<device>/<op>.jsonl, sorted, one a line. Read only.

No lookup writes a file, whatever is in them. Imports neither SQLite nor torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mla_jit import resources, settings
from mla_jit.tuning.rows import PROBLEMS, PROVENANCES, Trial, defaults, parsed, slug
from mla_jit.tuning.store import PROBLEM_COLUMNS, plain

_shipped: dict[tuple[object, ...], tuple[Trial, ...]] = {}
_told: set[Path] = set()  # files of whose faults was warned


def rows(device: str, op: str, **fields: Any) -> tuple[Trial, ...]:
    """The shipped rows of a device and an op, read once a process; () where there are none or `shipped_db` is off.

    `fields`: only those whose problem has these values; the others are not made into trials.
    Bad, repeated and contradictory lines are skipped with one warning a file; `check` lists them.
    """
    if not settings.current().shipped_db:
        return ()
    key = device, op, *sorted(fields.items())
    if key not in _shipped:
        try:
            path = resources.path("tuning_db", slug(device), f"{op}.jsonl")
        except FileNotFoundError:
            return _shipped.setdefault(key, ())
        try:
            kept, faults, _ = _examine(path, fields)
        except OSError as error:
            kept, faults = [], [str(error)]
        _shipped[key] = tuple(kept)
        if faults and path not in _told:
            _told.add(path)
            warnings.warn(
                f"{path} is used without its faults ({len(faults)}, the first: {faults[0]}); "
                "reinstall mla_jit, or report it",
                stacklevel=2,
            )
    return _shipped[key]


def check(path: Path) -> list[str]:
    """What is wrong with a file of shipped rows, one line a fault; [] for a good one. OSError if it cannot be read."""
    _, faults, style = _examine(path)
    return faults + style


def export(trials: Iterable[Trial], path: Path) -> int:
    """Writes trials as a file of shipped rows, sorted, each once; the number written.

    What stood at `path` is replaced at once or not at all; no other file is touched. InvalidInput, OSError.
    """
    rows = sorted({trial.to_json(): trial for trial in map(plain, trials)}.values(), key=_order)
    path.parent.mkdir(parents=True, exist_ok=True)
    resources.write_whole(path, "".join(f"{trial.to_json()}\n" for trial in rows))
    return len(rows)


def _order(trial: Trial) -> tuple[Any, ...]:
    """The order of shipped rows: by problem, then where, then what."""
    values = (getattr(trial.problem, name, None) for name in PROBLEM_COLUMNS)
    problem = tuple((0,) if value is None else (1, value) for value in values)
    place = trial.target, trial.device, PROVENANCES.index(trial.provenance)
    return problem, place, trial.config.to_json(), trial.to_json()


def _examine(
    path: Path, fields: Mapping[str, Any] | None = None
) -> tuple[list[Trial], list[str], list[str]]:  # fmt: skip
    """Of a file of shipped rows: the good ones, why the others are not used, and what only its looks lack.

    With `fields` only rows of such problems, and nothing of the looks.
    """
    kept: list[Trial] = []
    faults, style = [], []
    lines: dict[tuple[Any, ...], tuple[int, Trial]] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = raw.decode()
            data = parsed(line)
            if fields is not None:
                problem = data["problem"]
                left_out = defaults(PROBLEMS[problem["op"]])
                if any((problem[n] if n in problem else left_out[n]) != value for n, value in fields.items()):
                    continue
            trial = plain(Trial.from_data(data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # InvalidInput, UnicodeDecodeError: values
            faults.append(f"line {number}: {error}")
            continue
        if slug(trial.device) != path.parent.name or trial.op != path.stem:
            faults.append(f"line {number}: belongs to {slug(trial.device)}/{trial.op}.jsonl")
            continue
        claim = trial.problem, trial.config, trial.target, trial.device, trial.provenance
        first, other = lines.setdefault(claim, (number, trial))
        if first != number:
            what = "repeats" if trial == other else "contradicts"
            faults.append(f"line {number}: {what} line {first}, the same config for the same problem")
            continue
        if fields is None and line != trial.to_json():
            style.append(f"line {number}: not spelt as `export` writes it")
        if fields is None and kept and _order(kept[-1]) > _order(trial):
            style.append(f"line {number}: out of order; `export` sorts")
        kept.append(trial)
    return kept, faults, style


def forget() -> None:
    """The files are read again when they are next asked for."""
    _shipped.clear()
    _told.clear()
