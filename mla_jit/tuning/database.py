"""Tuning databases as wholes: what one holds, two side by side, rows in and out, and rows measured again.

A source of rows is a database or a .jsonl file of rows in the form that the package ships; which rows are best is
always said by a database's own view. The verbs of cli_database.py print what these functions return. Times in µs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import queue
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from mla_jit import ops
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, StoreError
from mla_jit.problem import Tunable
from mla_jit.target import Target
from mla_jit.tuning import lookup, shipped, store, sweep
from mla_jit.tuning.rows import OK, PROVENANCES, Measurement, Trial, slug
from mla_jit.tuning.store import Store, plain

_NAMED = 20  # bad lines of a file that a message names
_MEASURED, _IMPORTED, _PREDICTED = PROVENANCES

# -------------------------------------------------------------------------------------------------------------- sources


@contextlib.contextmanager
def opened(source: Path) -> Iterator[Store]:
    """The rows of a database or of a .jsonl file, to read. StoreError; InvalidInput for a bad line."""
    if source.suffix == ".jsonl":
        with _gathered(lines(source)) as held:
            yield held
    else:
        with Store(source, readonly=True) as held:
            yield held


@contextlib.contextmanager
def _gathered(trials: Iterable[Trial]) -> Iterator[Store]:
    """A database for a moment, so that its view says which of the trials are best."""
    with tempfile.TemporaryDirectory(prefix="mla_jit-") as directory, Store(Path(directory) / "rows.db") as held:
        held.add(trials)
        yield held


def lines(path: Path) -> list[Trial]:
    """The rows of a .jsonl file. InvalidInput names each line that is none."""
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}; name a .jsonl file of rows") from error
    found: list[Trial] = []
    faults: list[str] = []
    for number, line in enumerate(raw, 1):
        try:
            found.append(_row(line))
        except (ValueError, OverflowError) as error:  # InvalidInput and UnicodeError are
            faults.append(f"line {number}: {error}")
    if faults:
        more = f"\n… and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        named = "\n".join(faults[:_NAMED])
        raise InvalidInput(f"{path} is not used, {len(faults)} of its {len(raw)} lines are bad; see to\n{named}{more}")
    return found


def _row(line: bytes) -> Trial:
    """The row of a line, with values that the columns of a database can hold."""
    trial = plain(Trial.from_json(line.decode()))
    for name, value in zip(store._COLUMNS, store._record(trial), strict=True):
        if value is None and name not in store._NULLABLE | store._FOREIGN[trial.op]:
            raise InvalidInput(f"{name} is missing")
        if isinstance(value, int) and value.bit_length() > 63:
            raise InvalidInput(f"{name} is {value}, more than an integer of SQLite can be")
        if isinstance(value, str):
            value.encode()
    if trial.median_us is not None and trial.median_us <= 0:
        raise InvalidInput(f"median_us is {trial.median_us}, which no call takes")
    return trial


def _check_database(path: Path, remedy: str) -> None:
    if path.suffix == ".jsonl":
        raise InvalidInput(f"{path} is a file of rows, not a database; {remedy}")


# ------------------------------------------------------------------------------------------------------------- contents


@dataclass(frozen=True)
class Contents:
    """What a source holds: the number of its trials, the best of each problem and device, and those that failed."""

    trials: int
    best: tuple[Trial, ...]
    faults: tuple[Trial, ...]


def show(source: Path) -> Contents:
    """What a database, or a .jsonl file, holds."""
    with opened(source) as held:
        trials = list(held.trials())
        return Contents(len(trials), tuple(held.best()), tuple(t for t in trials if t.status != OK))


def export(source: Path, directory: Path) -> dict[Path, int]:
    """Writes what a lookup needs as <directory>/<device>/<op>.jsonl, as the package ships it; the rows by file.

    These are the best rows; and of problems that differ in lengths alone, for each length, those of the config that is
    steady over the lengths up to it, which a call without hints is given whose table holds as many tokens.
    """
    groups: dict[Path, dict[tuple[object, ...], Trial]] = {}
    with opened(source) as held:
        for trial in (*held.best(), *_of_any_length(list(held.trials(status=OK)))):
            rows = groups.setdefault(directory / slug(trial.device) / f"{trial.op}.jsonl", {})
            rows.setdefault((trial.problem, trial.config, trial.target, trial.device, trial.provenance), trial)
    return {path: shipped.export(groups[path].values(), path) for path in sorted(groups)}


def _of_any_length(trials: Sequence[Trial]) -> Iterator[Trial]:
    """By family of lengths, and for each of them, the rows of the config that is robust over those up to it, and of
    what it is alike to: of playoffs, and of newest revisions."""
    newest: dict[str, int] = {}
    for trial in trials:
        newest[trial.variant] = max(trial.revision, newest.get(trial.variant, 0))
    families: dict[tuple[object, ...], dict[tuple[Tunable, Config], Trial]] = {}
    for trial in trials:
        if trial.effort == sweep.LAST and trial.revision == newest[trial.variant] and trial.provenance != _PREDICTED:
            problem = dataclasses.replace(trial.problem, **trial.problem.LENGTHS)
            rows = families.setdefault((problem, trial.target, trial.device), {})
            known = rows.setdefault((trial.problem, trial.config), trial)
            rows[trial.problem, trial.config] = min(known, trial, key=lambda t: (t.median_us or 0.0, t.created))
    for rows in families.values():
        for capacity in sorted({problem.max_kv_len for problem, _ in rows}):
            held = [trial for trial in rows.values() if trial.problem.max_kv_len <= capacity]
            pillars = lookup.pillars(sorted(held, key=lambda t: str(t.problem)))
            yield from (trial for trial in held if trial.config in pillars)


# --------------------------------------------------------------------------------------------------------------- adding


@dataclass(frozen=True)
class Added:
    """Of the rows of some sources: how many were read, and how many of them were new."""

    read: int
    added: int


def merge(path: Path, others: Sequence[Path]) -> Added:
    """Adds the trials of other databases, as they are: all are kept, none twice, in any order the same.

    All are read before any is added, in one transaction. InvalidInput for a .jsonl file, which is for `import_rows`.
    """
    for each in (path, *others):
        _check_database(each, "`mla-tune import` takes its rows into a database")
    trials: list[Trial] = []
    for other in others:
        with Store(other, readonly=True) as theirs:
            trials += theirs.trials()
    with Store(path) as held:
        return Added(len(trials), held.add(trials))


def import_rows(path: Path, sources: Sequence[Path]) -> Added:
    """Adds the rows of .jsonl files or other databases, in one transaction; what was `measured` becomes `imported`.

    Rows that this very database has measured are not new. InvalidInput, with nothing added, for a bad line.
    """
    _check_database(path, "name the database that takes the rows")
    trials: list[Trial] = []
    for source in sources:
        if source.exists() and path.exists() and source.samefile(path):
            raise InvalidInput(f"{source} is the database itself; import another one, or a .jsonl file")
        with opened(source) as theirs:
            trials += theirs.trials()
    with Store(path) as held:
        own = set(held.trials(provenance=_MEASURED))
        foreign = [_foreign(trial) for trial in trials if trial not in own]
        return Added(len(trials), held.add(foreign))


def _foreign(trial: Trial) -> Trial:
    return dataclasses.replace(trial, provenance=_IMPORTED) if trial.provenance == _MEASURED else trial


# ----------------------------------------------------------------------------------------------------------- comparing

_Key = tuple[Tunable, str, str]


@dataclass(frozen=True)
class Pair:
    """The best rows that A and B have for a problem on a device. `slower`: B's, beyond tolerance and spread."""

    a: Trial
    b: Trial
    slower: bool

    @property
    def ratio(self) -> float:
        """B's time by A's."""
        return _us(self.b) / _us(self.a)


@dataclass(frozen=True)
class Comparison:
    """Two sources side by side, by problem. `only_a` and `only_b` are the best rows that the other has none for."""

    pairs: tuple[Pair, ...]
    only_a: tuple[Trial, ...]
    only_b: tuple[Trial, ...]

    @property
    def geometric_mean(self) -> float | None:
        """Of the ratios; None where there are none."""
        return statistics.geometric_mean(pair.ratio for pair in self.pairs) if self.pairs else None

    @property
    def slower(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.slower)

    @property
    def ok(self) -> bool:
        """Whether something was compared, and nothing is slower in B."""
        return bool(self.pairs) and not self.slower


def compare(a: Path, b: Path, *, tolerance: float = 0.03) -> Comparison:
    """The times of B's best rows against those of A's, by problem and device. Predictions are left out: no times.

    A shape is slower in B if it takes longer by more than `tolerance` (0.03 is 3 %) and by more than either spread.
    """
    mine, theirs = _timed(a), _timed(b)
    pairs = [Pair(mine[key], theirs[key], slower(mine[key], theirs[key], tolerance)) for key in mine if key in theirs]
    return Comparison(
        pairs=tuple(sorted(pairs, key=lambda pair: shipped._order(pair.a))),
        only_a=_sorted(trial for key, trial in mine.items() if key not in theirs),
        only_b=_sorted(trial for key, trial in theirs.items() if key not in mine),
    )


def slower(then: Trial, now: Trial | Measurement, tolerance: float) -> bool:
    """Whether it takes longer now, by more than the tolerance and than either spread (max - min over rounds)."""
    more = _us(now) - _us(then)
    return more > tolerance * _us(then) and more > max(then.spread_us or 0.0, now.spread_us or 0.0)


def _timed(source: Path) -> dict[_Key, Trial]:
    with opened(source) as held:
        return {_key(trial): trial for trial in held.best() if trial.provenance != _PREDICTED and _us(trial) > 0}


def _key(trial: Trial) -> _Key:
    return trial.problem, trial.target, trial.device


def _us(found: Trial | Measurement) -> float:
    assert found.median_us is not None
    return found.median_us


def _sorted(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    return tuple(sorted(trials, key=shipped._order))


@dataclass(frozen=True)
class Difference:
    """Two sources as sets of rows; `changed` are the best rows, A's and B's, of problems whose best config differs."""

    only_a: tuple[Trial, ...]
    only_b: tuple[Trial, ...]
    changed: tuple[tuple[Trial, Trial], ...]

    @property
    def equal(self) -> bool:
        return not self.only_a and not self.only_b

    def text(self) -> Iterator[str]:
        """Lines: the best configs that changed, then the rows that only one has. The same for the same rows."""
        for a, b in self.changed:
            yield f"@@ best: {a.problem}; {a.device}"
            yield from (f"{sign} {t.median_us:.2f} us ({t.provenance})  {t.config}" for sign, t in (("-", a), ("+", b)))
        rows = [(shipped._order(t), sign, t) for sign, some in (("-", self.only_a), ("+", self.only_b)) for t in some]
        if rows:
            yield f"@@ rows: {len(self.only_a)} only in A, {len(self.only_b)} only in B"
        yield from (f"{sign} {trial.to_json()}" for _, sign, trial in sorted(rows, key=lambda row: row[:2]))


def diff(a: Path, b: Path) -> Difference:
    """What two sources do not have in common."""
    with opened(a) as mine, opened(b) as theirs:
        rows = set(mine.trials()), set(theirs.trials())
        best, other = ({_key(trial): trial for trial in held.best()} for held in (mine, theirs))
    changed = [best[key] for key in best if key in other and best[key].config != other[key].config]
    return Difference(
        only_a=_sorted(rows[0] - rows[1]), only_b=_sorted(rows[1] - rows[0]),
        changed=tuple((trial, other[_key(trial)]) for trial in _sorted(changed)),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- pruning


@dataclass(frozen=True)
class Selection:
    """Which trials: those of which all that is set holds.

    stale: of a revision of their variant, or of a toolchain, that is not today's here. faults: those that failed.
    effort: of this effort or less. device: of this device. older_than_days: made before; one without a date is not old.
    """

    stale: bool = False
    faults: bool = False
    effort: int | None = None
    device: str | None = None
    older_than_days: float | None = None

    def __bool__(self) -> bool:
        return self != Selection()


@dataclass(frozen=True)
class Pruned:
    """The trials that went (or would go), those of them that were the best of a problem, and how many stay.

    `note` says why the file did not become smaller, if it did not.
    """

    removed: tuple[Trial, ...]
    lost: tuple[Trial, ...]
    kept: int
    note: str = ""


def prune(path: Path, selection: Selection, *, dry_run: bool = False) -> Pruned:
    """Removes the selected trials from a database, the best of a problem only if it is selected itself.

    `dry_run` only says which they are. InvalidInput for an empty selection, or a .jsonl file.
    """
    _check_database(path, "prune is for databases, and removes nothing of what the package ships")
    if not selection:
        raise InvalidInput(
            "nothing says which trials to remove; select by stale, faults, effort, device or older_than_days"
        )
    now, revisions, toolchain = dt.datetime.now(dt.timezone.utc), _revisions(), sweep.toolchain()

    def chosen(trial: Trial) -> bool:
        s = selection
        return (
            (not s.stale or stale(trial, revisions, toolchain))
            and (not s.faults or trial.status != OK)
            and (s.effort is None or trial.effort <= s.effort)
            and (s.device is None or trial.device == s.device)
            and (s.older_than_days is None or _age_days(trial, now) > s.older_than_days)
        )

    with Store(path, readonly=True) as held:
        before, best = list(held.trials()), set(held.best())
    removed, note = [trial for trial in before if chosen(trial)], ""
    kept = len(before) - len(removed)
    if not dry_run:
        with Store(path) as held:
            removed = held.remove(chosen)
            kept = len(list(held.trials()))
            if removed:
                note = _vacuum(held)
    return Pruned(tuple(removed), _sorted(best.intersection(removed)), kept, note)


def stale(trial: Trial, revisions: Mapping[str, int], toolchain: str) -> bool:
    """Whether a trial is of another revision of its variant, or of another toolchain, than these."""
    return trial.revision != revisions.get(trial.variant) or trial.toolchain != toolchain


def _revisions() -> dict[str, int]:
    return {variant.name: variant.revision for op in ops.OPS for variant in ops.every(op)}


def _age_days(trial: Trial, now: dt.datetime) -> float:
    """-inf without a date."""
    try:
        created = dt.datetime.fromisoformat(trial.created.replace("Z", "+00:00"))
    except ValueError:
        return float("-inf")
    if created.tzinfo is None:
        created = created.replace(tzinfo=dt.timezone.utc)
    return (now - created) / dt.timedelta(days=1)


def _vacuum(held: Store) -> str:
    """Why the file keeps its size, or ""; the trials are gone in any case."""
    try:
        held.vacuum()
    except StoreError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------------ verifying


@dataclass(frozen=True)
class Verifiable:
    """The best rows that a machine can measure again, and how many it cannot: of another device, or only predicted.

    `left_out` were beyond the limit.
    """

    rows: tuple[Trial, ...]
    elsewhere: int
    predicted: int
    left_out: int


@dataclass(frozen=True)
class Verified:
    """A stored row, and what it comes to now. `slower`: than stored, beyond tolerance and spread."""

    trial: Trial
    device: str
    now: Measurement
    slower: bool

    @property
    def ok(self) -> bool:
        """Whether it is right, and as fast as stored."""
        return self.now.status == OK and not self.slower

    @property
    def ratio(self) -> float | None:
        """Today's time by the stored one."""
        return None if self.now.median_us is None else self.now.median_us / _us(self.trial)


def verifiable(source: Path | None, target: Target, limit: int | None = None) -> Verifiable:
    """The best rows of a source, or of what ships for the target's device (None), that can be measured on it.

    A limit takes so many of them, spread over all shapes.
    """
    if source is None:
        stored = _gathered(trial for op in ops.OPS for trial in shipped.rows(target.device, op))
    else:
        stored = opened(source)
    with stored as held:
        best = _sorted(held.best())
    mine = [trial for trial in best if (trial.target, trial.device) == (target.name, target.device)]
    timed = [trial for trial in mine if trial.provenance != _PREDICTED and _us(trial) > 0]
    count = len(timed) if limit is None else min(limit, len(timed))
    rows = tuple(timed[i * len(timed) // count] for i in range(count))
    return Verifiable(rows, len(best) - len(mine), len(mine) - len(timed), len(timed) - count)


def verify(
    trials: Sequence[Trial], devices: Sequence[str], pool: sweep.Measurer, *, tolerance: float = 0.10,
    timeout_s: float = 60.0,
) -> Iterator[Verified]:  # fmt: skip
    """Checks and times stored rows again, each on one of the devices; yields as they end. Stores nothing.

    A row is timed as its effort says. One that seems slower is timed once more, and its better time counts.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def one(trial: Trial) -> Verified:
        device = free.get()
        try:
            return _again(trial, device, pool, tolerance, timeout_s)
        finally:
            free.put(device)

    threads = ThreadPoolExecutor(len(devices))
    try:
        for done in as_completed([threads.submit(one, trial) for trial in trials]):
            yield done.result()
    finally:
        threads.shutdown(cancel_futures=True)


def _again(trial: Trial, device: str, pool: sweep.Measurer, tolerance: float, timeout_s: float) -> Verified:
    rounds, window_ms = sweep.EFFORTS[min(max(trial.effort, 0), len(sweep.EFFORTS) - 1)]

    def measure() -> Measurement:
        return pool.measure(
            device, trial.problem, trial.config, rounds=rounds, window_ms=window_ms, timeout_s=timeout_s
        )

    now = measure()
    if now.status == OK and slower(trial, now, tolerance):
        again = measure()
        now = now if again.status == OK and _us(again) > _us(now) else again
    return Verified(trial, device, now, now.status == OK and slower(trial, now, tolerance))
