"""The tuning database: the user's SQLite file, the rows shipped with the package, and `lookup` over both.

    <user's cache directory>/tuning.db     table `trials`, one row a trial, appended only; view `best`
    tuning_db/<device>/<op>.jsonl          shipped rows, sorted, one a line; read only, whatever is in them

A serving process without a database of its own never loads SQLite, and no lookup writes or creates a file. Nothing here
imports torch. Times in µs, lengths in tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, ne
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_jit import resources, settings
from mla_jit.compile import layers, locks
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, StoreError
from mla_jit.problem import DecodeProblem, Problem, bucket
from mla_jit.target import Target
from mla_jit.tuning.rows import OK, PROBLEMS, PROVENANCES, Trial, slug

if TYPE_CHECKING:
    import sqlite3

    from sqlite_utils import Database

Legal = Callable[[Config], str | None]  # the reason why a config cannot be used, or None

_LOOKUP_TIMEOUT_S = 2.0  # a call does not wait longer for a locked database; readers wait on no writer under WAL


def user_path() -> Path:
    """The user's database: the setting `tuning_db`, else tuning.db in the user's cache directory. It need not exist."""
    return settings.current().tuning_db or settings.user_cache_dir() / "tuning.db"


# ------------------------------------------------------------------------------------------------------------- schema

# The columns of version 1. They never change: a new field of a problem or of a Trial is a new function in MIGRATIONS.
_PROBLEM_1: dict[str, type] = {
    "op": str, "num_heads": int, "kv_lora_rank": int, "rope_dim": int, "num_kv_heads": int, "q_dtype": str,
    "kv_dtype": str, "out_dtype": str, "page_size": int, "layout": str, "q_split": int, "paging": str, "has_lens": int,
    "ragged": int, "causal": int, "soft_cap": int, "sinks": int, "lse": int, "q_scale": int, "kv_scale": int,
    "context_parallel": int, "misaligned": str, "flat_pages": int, "index64": str, "batch": int, "q_len": int,
    "max_kv_len": int, "hinted": int, "total_kv": int, "num_kv_splits": int, "batch_invariant": int,
}  # fmt: skip
_TRIAL_1: dict[str, type] = {
    "target": str, "device": str, "revision": int, "status": str, "median_us": float, "spread_us": float,
    "default_us": float, "rel_l2": float, "registers": int, "spill_bytes": int, "smem_bytes": int, "source_hash": str,
    "toolchain": str, "driver": str, "torch": str, "effort": int, "policy": str, "command": str, "provenance": str,
    "created": str, "note": str,
}  # fmt: skip
_NULLABLE = {
    "total_kv", "num_kv_splits", "median_us", "spread_us", "default_us", "rel_l2", "registers", "spill_bytes",
    "smem_bytes",
}  # fmt: skip


def _version_1(db: Database) -> None:
    columns = {"id": int, "content": str, **_PROBLEM_1, "variant": str, "config": str, **_TRIAL_1}
    db.execute(db.create_table_sql("trials", columns, pk="id", not_null=set(columns) - _NULLABLE - {"id"}))
    db.execute("CREATE UNIQUE INDEX trials_content ON trials (content)")
    db.execute("CREATE INDEX trials_device_op ON trials (device, op)")
    # Of a problem on a device: of each variant only its newest revision; predictions after all measurements, and the
    # search's short ones after the playoff's.
    group = ", ".join((*_PROBLEM_1, "target", "device"))
    newest = f"max(revision) OVER (PARTITION BY {group}, variant, provenance = 'predicted')"
    order = "provenance = 'predicted', effort DESC, median_us, coalesce(json_extract(config, '$.num_kv_splits'), 0)"
    place = f"row_number() OVER (PARTITION BY {group} ORDER BY {order}, config, content)"
    good = f"SELECT *, {newest} AS newest FROM trials WHERE status = '{OK}'"
    ranked = f"SELECT *, {place} AS place FROM ({good}) WHERE revision = newest"
    db.execute(f"CREATE VIEW best AS SELECT {', '.join(columns)} FROM ({ranked}) WHERE place = 1")


# The function at place n takes a database of version n to n + 1; the version stands in PRAGMA user_version. They run in
# one transaction, so by `execute`: what else changes a schema in sqlite-utils 3 commits.
MIGRATIONS: tuple[Callable[[Database], None], ...] = (_version_1,)

_PROBLEM = tuple(f.name for f in dataclasses.fields(DecodeProblem))
_TRIAL = tuple(f.name for f in dataclasses.fields(Trial) if f.name not in ("problem", "config"))
_COLUMNS = (*_PROBLEM, "config", *_TRIAL)
_BOOLS = {f.name for f in dataclasses.fields(DecodeProblem) if f.type == "bool"}
_TUPLES = {f.name for f in dataclasses.fields(DecodeProblem) if str(f.type).startswith("tuple")}
_FLOATS = {f.name for f in dataclasses.fields(Trial) if str(f.type).startswith("float")}
_INTS = {
    f.name for c in (DecodeProblem, Trial) for f in dataclasses.fields(c) if str(f.type).startswith("int")
} | _BOOLS  # fmt: skip


def _sql(name: str, value: Any) -> int | float | str | None:
    """A field's value as its column has it; ValueError or TypeError for one of another type."""
    if value is None:
        return None
    if name in _TUPLES:
        return ",".join(value)
    if name in _FLOATS:  # neither JSON nor SQLite has a NaN; an error that is one is told by the status
        return float(value) if math.isfinite(value) else None
    if name in _INTS:
        return int(value)
    if isinstance(value, Config):
        return value.to_json()
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not text")
    return value


def _record(trial: Trial) -> tuple[int | float | str | None, ...]:
    """The trial's values in the order of _COLUMNS; InvalidInput for one that no column can hold."""
    try:
        if not all(isinstance(value, (int, str)) for value in trial.config.values()):
            raise TypeError(f"config {trial.config}: not all integers, texts and booleans")
        problem = [_sql(name, getattr(trial.problem, name)) for name in _PROBLEM]
        return (*problem, trial.config.to_json(), *(_sql(name, getattr(trial, name)) for name in _TRIAL))
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"no tuning row: {error}") from error


def _trials(
    records: Iterable[tuple[Any, ...]], bad: Callable[[InvalidInput], None] | None = None
) -> Iterator[Trial]:  # fmt: skip
    """Trials of records in the order of _COLUMNS. What is none goes to `bad`, or raises InvalidInput."""
    problems: dict[tuple[Any, ...], DecodeProblem] = {}
    configs: dict[str, Config] = {}
    n = len(_PROBLEM)
    for record in records:
        try:
            if (problem := problems.get(record[:n])) is None:
                fields = dict(zip(_PROBLEM, record, strict=False))
                fields |= {name: bool(fields[name]) for name in _BOOLS}
                fields |= {name: tuple(fields[name].split(",")) if fields[name] else () for name in _TUPLES}
                problem = problems[record[:n]] = PROBLEMS[fields["op"]](**fields)
            if (config := configs.get(record[n])) is None:
                config = configs[record[n]] = Config.from_json(record[n])
            yield Trial(problem=problem, config=config, **dict(zip(_TRIAL, record[n + 1 :], strict=True)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fault = InvalidInput(f"no tuning row: {error!r} in {str(record)[:120]}")
            if bad is None:
                raise fault from error
            bad(fault)


def _plain(trial: Trial) -> Trial:
    """The trial as it comes back from a column or a line: 8 → 8.0, NaN → None. InvalidInput for what is none."""
    return next(_trials([_record(trial)]))


# -------------------------------------------------------------------------------------------------------------- Store

_guard = threading.RLock()  # held while any connection is in use, so that a fork finds none at work
_stores: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """A tuning database; opened, made and migrated by the constructor. Safe in threads, across forks, among processes.

    `readonly` never writes and wants an existing file. What goes wrong is a StoreError; a trial that cannot be a row is
    an InvalidInput. Connections are closed before a fork and open again at their next use, on both sides: SQLite's
    locks belong to a process, and a child that inherited a connection would believe in locks that it does not have.
    """

    def __init__(self, path: Path, readonly: bool = False, *, timeout_s: float = 30.0):
        self.path, self.readonly, self.timeout_s = Path(path), readonly, timeout_s
        self._connection: sqlite3.Connection | None = None
        with _guard:
            _stores.add(self)
            self._open()

    def __enter__(self) -> Store:  # noqa: PYI034
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, trials: Iterable[Trial]) -> int:
        """Appends trials in one transaction; those that are there already are left out. The number appended."""
        if self.readonly:
            raise StoreError(f"the tuning database {self.path} was opened for reading; open it without readonly")
        rows = []
        for trial in map(_plain, trials):
            content = hashlib.sha256(trial.to_json().encode()).hexdigest()
            rows.append((content, trial.variant, *_record(trial)))
        columns = ", ".join(("content", "variant", *_COLUMNS))
        statement = (
            f"INSERT INTO trials ({columns}) VALUES ({', '.join('?' * (len(_COLUMNS) + 2))}) "
            "ON CONFLICT (content) DO NOTHING"
        )
        with _guard, _told(self.path), _transaction(self._open()) as connection:
            before = connection.total_changes
            connection.executemany(statement, rows)
            return connection.total_changes - before

    def merge(self, other: Path) -> int:
        """Appends the trials of another database; the number appended. In any order, any number of times: the same."""
        with Store(other, readonly=True, timeout_s=self.timeout_s) as store:
            return self.add(store.trials())

    def trials(self, **filters: Any) -> Iterator[Trial]:
        """The trials in the order of their adding; of them those whose columns have these values.

        A filter is a column of the table (a problem's fields, `variant`, `config`, `device`, `status`, …), or `problem`
        for all of a problem's. InvalidInput for an unknown one.
        """
        return _trials(self._select("trials", filters))

    def best(self, **filters: Any) -> Iterator[Trial]:
        """The view `best`: a problem's fastest good trial a device. `filters` as for `trials`."""
        return _trials(self._select("best", filters))

    def close(self) -> None:
        """Closes the connection; another use opens it again."""
        with _guard:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _select(self, source: str, filters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        if (problem := filters.get("problem")) is not None:
            filters = {name: value for name, value in filters.items() if name != "problem"} | problem.fields()
        if unknown := set(filters) - {*_COLUMNS, "variant"}:
            names = ", ".join(("variant", *_COLUMNS))
            raise InvalidInput(f"the tuning database has no column {', '.join(sorted(unknown))}; it has {names}")
        where = " AND ".join(f"{name} IS ?" for name in filters) or "1"
        values = [_sql(name, value) for name, value in filters.items()]
        with _guard, _told(self.path):
            connection = self._open()
            if self.readonly and not _version(connection, self.path):
                return []  # made by a process that was killed before it could make the table
            query = f"SELECT {', '.join(_COLUMNS)} FROM {source} WHERE {where} ORDER BY id"
            return connection.execute(query, values).fetchall()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            with _told(self.path):
                self._connection = self._read_only() if self.readonly else self._writable()
        return self._connection

    def _writable(self) -> sqlite3.Connection:
        layers.make_private(self.path.absolute().parent)
        # Only where there is none: closing a second descriptor of a database drops the locks that we have on it.
        if not self.path.exists():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        connection = _connect(self.path, "mode=rw", self.timeout_s)
        try:
            if _version(connection, self.path) < len(MIGRATIONS):
                _migrate(connection, self.path)
            # A rollback journal on network file systems: WAL needs memory that all its users share.
            _set_journal(connection, "delete" if locks.on_network(self.path) else "wal", self.timeout_s)
        except BaseException:
            connection.close()
            raise
        return connection

    def _read_only(self) -> sqlite3.Connection:
        if not self.path.exists():
            raise StoreError(f"there is no tuning database {self.path}; `mla-tune run` makes one")
        directory = os.access(self.path.absolute().parent, os.W_OK)
        journal, wal = (self.path.with_name(self.path.name + end).exists() for end in ("-journal", "-wal"))
        mode = "mode=ro"
        if not directory and not wal and not journal:
            mode = "mode=ro&immutable=1"  # WAL wants to make files beside the database even for reading
        elif directory and journal:
            mode = "mode=rw"  # perhaps of a killed writer, whose half transaction must be taken back before reading
        connection = _connect(self.path, mode, self.timeout_s)
        try:
            connection.execute("PRAGMA query_only = ON")
            if 0 < (version := _version(connection, self.path)) < len(MIGRATIONS):
                raise StoreError(
                    f"the tuning database {self.path} has schema version {version}, this mla_jit has "
                    f"{len(MIGRATIONS)}; open it once for writing (Store(path)), which brings it up to date"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _connect(path: Path, mode: str, timeout_s: float) -> sqlite3.Connection:
    import sqlite3

    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=timeout_s, isolation_level=None, check_same_thread=False
    )  # fmt: skip


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """The schema's version, 0 for an empty file; StoreError for one that is newer than we know, or not ours."""
    # Of one statement, so of one moment: another process may just be making the tables.
    query = "SELECT user_version, (SELECT count(*) FROM sqlite_master), (SELECT count(*) FROM sqlite_master "
    query += "WHERE type = 'table' AND name = 'trials') FROM pragma_user_version"
    version, things, ours = connection.execute(query).fetchone()
    if things and not (ours and version):
        raise StoreError(f"{path} is a database of another program; set MLA_JIT_TUNING_DB to another file")
    if version > len(MIGRATIONS):
        raise StoreError(
            f"the tuning database {path} has schema version {version}, this mla_jit knows {len(MIGRATIONS)}; "
            "update mla_jit, or set MLA_JIT_TUNING_DB to another file"
        )
    return int(version)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Takes the schema to the newest version, in one transaction."""
    from sqlite_utils import Database

    with _transaction(connection):
        version = _version(connection, path)  # again: now nobody else is at it
        database = Database(connection, execute_plugins=False)
        for migration in MIGRATIONS[version:]:
            migration(database)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _set_journal(connection: sqlite3.Connection, wanted: str, timeout_s: float) -> None:
    """The journal's mode stands in the file; where a file system cannot do WAL, SQLite keeps the other."""
    import sqlite3

    deadline = time.monotonic() + timeout_s
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != wanted:
        try:
            connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
            return
        except sqlite3.OperationalError:  # this change needs the file alone and does not itself wait for that
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """SQLite's and the system's errors as StoreError, with the remedy."""
    import sqlite3

    try:
        yield
    except (sqlite3.Error, OSError) as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            remedy = "Another process has been writing for long; try again when it is done"
        elif "not a database" in text or "malformed" in text:
            remedy = "It is damaged; move it aside, or set MLA_JIT_TUNING_DB to another file"
        else:
            remedy = "See to its directory's permissions and free space, or set MLA_JIT_TUNING_DB to another file"
        raise StoreError(f"the tuning database {path} cannot be used: {text}. {remedy}") from error


def _before_fork() -> None:
    _guard.acquire()
    for store in list(_stores):
        store.close()


os.register_at_fork(before=_before_fork, after_in_parent=_guard.release, after_in_child=_guard.release)


# ------------------------------------------------------------------------------------------------------- shipped rows

_shipped: dict[tuple[str, str], tuple[Trial, ...]] = {}


def shipped(device: str, op: str) -> tuple[Trial, ...]:
    """The shipped rows of a device and an op, read once a process; () where there are none.

    Bad, repeated and contradictory lines are skipped with one warning a file; `check_shipped` lists them.
    """
    if (device, op) not in _shipped:
        try:
            path = resources.path("tuning_db", slug(device), f"{op}.jsonl")
        except FileNotFoundError:
            return _shipped.setdefault((device, op), ())
        try:
            kept, faults, _ = _examine(path)
        except OSError as error:
            kept, faults = [], [str(error)]
        _shipped[device, op] = tuple(kept)
        if faults:
            warnings.warn(
                f"{path} is used without its faults ({len(faults)}, the first: {faults[0]}); "
                "reinstall mla_jit, or report it",
                stacklevel=2,
            )
    return _shipped[device, op]


def check_shipped(path: Path) -> list[str]:
    """What is wrong with a file of shipped rows, one line a fault; [] for a good one. OSError if it cannot be read."""
    _, faults, style = _examine(path)
    return faults + style


def export(trials: Iterable[Trial], path: Path) -> int:
    """Writes trials as a file of shipped rows, sorted, each once; the number written.

    What stood at `path` is replaced at once or not at all; no other file is touched. InvalidInput, OSError.
    """
    rows = sorted({trial.to_json(): trial for trial in map(_plain, trials)}.values(), key=_order)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with staged.open("x", encoding="utf-8") as file:
            file.writelines(f"{trial.to_json()}\n" for trial in rows)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return len(rows)


def _order(trial: Trial) -> tuple[Any, ...]:
    """The order of shipped rows: by problem, then where, then what."""
    values = (getattr(trial.problem, name) for name in _PROBLEM)
    problem = tuple((0,) if value is None else (1, value) for value in values)
    place = trial.target, trial.device, PROVENANCES.index(trial.provenance)
    return problem, place, trial.config.to_json(), trial.to_json()


def _examine(path: Path) -> tuple[list[Trial], list[str], list[str]]:
    """Of a file of shipped rows: the good ones, why the others are not used, and what only its looks lack."""
    kept: list[Trial] = []
    faults, style = [], []
    lines: dict[tuple[Any, ...], tuple[int, Trial]] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = raw.decode()
            trial = _plain(Trial.from_json(line))
        except ValueError as error:  # InvalidInput and UnicodeDecodeError are
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
        if line != trial.to_json():
            style.append(f"line {number}: not spelt as `export` writes it")
        if kept and _order(kept[-1]) > _order(trial):
            style.append(f"line {number}: out of order; `export` sorts")
        kept.append(trial)
    return kept, faults, style


# ------------------------------------------------------------------------------------------------------------- lookup

_HARD_FIELDS = (
    "op", "kv_lora_rank", "rope_dim", "num_kv_heads", "q_dtype", "kv_dtype", "layout", "context_parallel",
    "batch_invariant",
)  # fmt: skip
_SOFT_FIELDS = (
    "page_size", "paging", "has_lens", "ragged", "causal", "soft_cap", "sinks", "lse", "q_split", "q_scale", "kv_scale",
    "out_dtype", "misaligned", "flat_pages", "index64",
)  # fmt: skip
_PLAYOFF = 2  # the effort from which times of different configs are comparable
_AXES = ("batch", "num_heads", "q_len", "kv")  # of a shape; kv is max_kv_len's bucket
_hard, _soft = attrgetter(*_HARD_FIELDS), attrgetter(*_SOFT_FIELDS)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """What `lookup` found. `provenance`: "measured", "imported", "stale", "neighbour" or "predicted".

    `stale` was measured for this very problem, but at another revision of the template or with another toolchain;
    `neighbour` was measured for another; what is only predicted is "predicted" for a neighbour too. `why` is one line.
    """

    config: Config
    provenance: str
    trial: Trial
    why: str


@dataclass(frozen=True)
class _Row:
    trial: Trial
    shipped: bool

    @property
    def order(self) -> tuple[Any, ...]:
        """Timed in a playoff; the user's; the fastest; of equals the one with the fewest splits, then by its text."""
        trial = self.trial
        playoff = trial.effort >= _PLAYOFF
        return not playoff, self.shipped, -trial.effort, trial.median_us, *_simplest(trial.config), trial.created


@dataclass(frozen=True)
class _Cell:
    """Rows of one shape whose problems differ in nothing that a lookup looks at."""

    shape: Shape
    soft: tuple[Any, ...]
    mean: int | None  # bucket of the mean length, where total_kv was given
    wish: int | None  # num_kv_splits
    rows: tuple[_Row, ...] = ()

    @classmethod
    def of(cls, problem: Any) -> _Cell:
        """The empty cell of a problem."""
        mean = None if problem.total_kv is None else bucket(-(-problem.total_kv // max(1, problem.batch)))
        shape = problem.batch, problem.num_heads, problem.q_len, bucket(problem.max_kv_len)
        return cls(shape, _soft(problem), mean, problem.num_kv_splits)

    def differences(self, asked: _Cell) -> tuple[int, float]:
        """In how many soft fields, hints and wishes it is another than what is asked for, and how far off in length."""
        count = sum(map(ne, self.soft, asked.soft)) + (self.wish != asked.wish)
        if self.mean is None or asked.mean is None:
            return count, 0.0 if self.mean == asked.mean else math.inf
        return count + (self.mean != asked.mean), _distance((self.mean,), (asked.mean,))

    def exactly(self, asked: _Cell) -> bool:
        return self.shape == asked.shape and not self.differences(asked)[0]

    def say(self, asked: _Cell) -> str:
        """The differences, one after the other: "batch 64 for 48, page_size 64 for 16"."""
        pairs: list[tuple[str, Any, Any]] = [*zip(_AXES, self.shape, asked.shape, strict=True)]
        pairs += zip(_SOFT_FIELDS, self.soft, asked.soft, strict=True)
        if self.mean is not None and asked.mean is not None:
            pairs.append(("mean length", self.mean, asked.mean))
        pairs.append(("num_kv_splits", self.wish, asked.wish))
        return ", ".join(f"{name} {has} for {wanted}" for name, has, wanted in pairs if has != wanted)


def _simplest(config: Config) -> tuple[int, str]:
    splits = config.get("num_kv_splits")
    return splits if isinstance(splits, int) else 0, config.to_json()


class _Pool:
    """Rows that may be neighbours: of one target, with equal hard fields, all measured or all predicted."""

    def __init__(self, rows: Iterable[_Row]):
        cells: dict[_Cell, list[_Row]] = {}
        for problem, group in itertools.groupby(rows, key=lambda row: row.trial.problem):
            cells.setdefault(_Cell.of(problem), []).extend(group)
        self.cells = [  # in an order that does not depend on the rows'
            dataclasses.replace(cell, rows=tuple(sorted(cells[cell], key=lambda row: row.order)))
            for cell in sorted(cells, key=lambda cell: (cell.shape, -(cell.mean or 0), str(cell)))
        ]
        self.shapes: dict[Shape, list[_Cell]] = {}
        for cell in self.cells:
            self.shapes.setdefault(cell.shape, []).append(cell)
        self.range = [(min(axis), max(axis)) for axis in zip(*self.shapes, strict=True)]

    def spans(self, shape: Shape) -> bool:
        """Whether each axis of the shape (the first ones, if it is shorter) is inside the range of the rows'."""
        return all(low <= x <= high for x, (low, high) in zip(shape, self.range, strict=False))


@dataclass(frozen=True)
class _Question:
    """A lookup: the problem's empty cell, and by what a row is judged."""

    asked: _Cell
    legal: Legal
    revisions: Mapping[str, int]
    toolchain: str

    def nearest(self, pool: _Pool) -> Found | None:
        """The row of the problem itself, else of the nearest shape that has a usable one, inside the pool's range."""
        asked = self.asked
        if (found := self._among(pool.shapes.get(asked.shape, ()))) is not None:
            return found
        if not pool.spans(asked.shape):
            return None
        return self._among(cell for cell in pool.cells if cell.shape != asked.shape)

    def _among(self, cells: Iterable[_Cell]) -> Found | None:
        """The best legal row of the nearest cell that has one; in a cell, stale rows after all others."""
        asked = self.asked
        order = sorted(self._usable(cells), key=lambda c: (_distance(c.shape, asked.shape), c.differences(asked)))
        for cell, stale in itertools.product(order, (False, True)):
            for row in cell.rows:
                if bool(self._stale(row.trial)) == stale and self._legal(row):
                    return self._found(cell, row)
        return None

    def robust(self, pool: _Pool) -> Found | None:
        """The config that does best in the worst case over lengths up to max_kv_len, at the nearest other sizes."""
        asked, sizes = self.asked, self.asked.shape[:3]
        cells = [c for c in self._usable(pool.cells) if c.shape[3] <= asked.shape[3]]
        if not cells or not pool.spans(sizes):
            return None
        nearest = min((_distance(c.shape[:3], sizes), c.shape[:3]) for c in cells)[1]
        lines: dict[tuple[Any, ...], list[_Cell]] = {}
        for cell in cells:
            if cell.shape[:3] == nearest:
                key = dataclasses.replace(cell, shape=(*nearest, asked.shape[3]), mean=None, rows=())
                lines.setdefault((key.differences(asked), str(key)), []).append(cell)
        for _, line in sorted(lines.items()):
            rows = [(cell, row) for cell in line for row in cell.rows if self._legal(row)]
            for stale, foreign in itertools.product((False, True), repeat=2):
                some = [(c, r) for c, r in rows if r.shipped == foreign and (stale or not self._stale(r.trial))]
                if (config := robust(row.trial for _, row in some)) is None:
                    continue
                mine = [(c, r) for c, r in some if r.trial.config == config]
                cell, row = min(mine, key=lambda pair: (-pair[0].shape[3], pair[1].order))
                lengths = sorted({c.shape[3] for c, _ in mine})
                unhinted = dataclasses.replace(cell, shape=(*nearest, asked.shape[3]), mean=None, rows=())
                return self._found(unhinted, row, f"best worst case over kv {', '.join(map(str, lengths))}; ")
        return None

    def _usable(self, cells: Iterable[_Cell]) -> Iterator[_Cell]:
        """Without those timed under another wish for splits than the problem's, which overrides the config's."""
        return (cell for cell in cells if cell.wish in (None, self.asked.wish))

    def reachable(self, pool: _Pool) -> Iterator[Config]:
        """The configs that this question may be answered with for any batch and length, hinted or not."""
        fixed = self.asked.shape[1:3]
        if not all(low <= x <= high for x, (low, high) in zip(fixed, pool.range[1:3], strict=True)):
            return
        shapes: dict[tuple[int, int], list[Shape]] = {}
        for shape in pool.shapes:
            shapes.setdefault((shape[0], shape[3]), []).append(shape)
        for (
            batch,
            kv,
        ), rivals in shapes.items():  # they differ in what is fixed, so one is the nearest whatever is asked
            cells = [cell for shape in rivals for cell in pool.shapes[shape]]
            asked = dataclasses.replace(self.asked, shape=(batch, *fixed, kv))
            for mean in {None, *(cell.mean for cell in cells)}:
                hinted = dataclasses.replace(self, asked=dataclasses.replace(asked, mean=mean))
                if (found := hinted._among(cells)) is not None:
                    yield found.config
            if (found := dataclasses.replace(self, asked=asked).robust(pool)) is not None:
                yield found.config

    def _legal(self, row: _Row) -> bool:
        config = row.trial.config
        try:  # a row of an older revision may lack a tunable, or have one of another type
            return config.variant in self.revisions and self.legal(config) is None
        except (KeyError, AssertionError):
            return False

    def _stale(self, trial: Trial) -> str:
        """Why the row is stale, or ""."""
        now = self.revisions.get(trial.config.variant)
        if trial.revision != now:
            return f"stale: revision {trial.revision}, now {now}"
        return "" if trial.toolchain == self.toolchain else f"stale: {trial.toolchain}, now {self.toolchain}"

    def _found(self, cell: _Cell, row: _Row, how: str = "") -> Found:
        trial, stale = row.trial, self._stale(row.trial)
        exact = cell.exactly(self.asked)
        provenance = trial.provenance
        if exact and stale:
            provenance = "stale"
        elif not exact and provenance != PROVENANCES[-1]:
            provenance = "neighbour"
        whose = "shipped row" if row.shipped else "the user's row"
        match = f"{whose} of this problem" if exact else f"nearest is a {whose.split()[-2]} row with "
        match += "" if exact else cell.say(self.asked)
        why = f"{how}{match}: {trial.provenance}, {trial.median_us:.2f} us" + (f"; {stale}" if stale else "")
        return Found(trial.config, provenance, trial, why)


def _distance(a: Shape, b: Shape) -> float:
    """Euclidean, of the sizes' binary logarithms."""
    return round(math.dist(_logs(a), _logs(b)), 9)


@functools.lru_cache(maxsize=65536)
def _logs(shape: Shape) -> tuple[float, ...]:
    return tuple(math.log2(max(x, 1)) for x in shape)


@dataclass(frozen=True)
class _Index:
    """What is in memory of a device's rows: pools by hard fields, measured ones first, and what `configs` found."""

    signature: object
    pools: dict[tuple[Any, ...], list[_Pool]]
    reachable: dict[object, tuple[Config, ...]] = dataclasses.field(default_factory=dict)


_indexes: dict[tuple[str, str, str], _Index] = {}


def lookup(
    problem: Problem, target: Target, legal: Legal, revisions: Mapping[str, int], toolchain: str, *,
    hinted: bool = True,
) -> Found | None:  # fmt: skip
    """The best stored config for a problem on a target's device, or None where nothing stored says anything of it.

    The rows of the problem itself, else of the nearest shape with the same hard fields that `legal` lets pass, never
    beyond the sizes measured; the user's before the shipped, current before stale, measured before predicted. Without
    hints (`hinted` False: max_kv_len is but a capacity) the config with the best worst case over the lengths measured.
    `revisions` and `toolchain` are today's, by variant; rows of a variant without a revision are not used.
    Never raises for what a database holds or lacks, and never creates one.
    """
    question = _Question(_Cell.of(problem), legal, revisions, toolchain)
    for pool in _index(target, problem.op).pools.get(_hard(problem), ()):
        if not hinted and (found := question.robust(pool)) is not None:
            return found
        if (found := question.nearest(pool)) is not None:
            return found
    return None


def configs(
    problem: Problem, target: Target, legal: Legal, revisions: Mapping[str, int], toolchain: str
) -> tuple[Config, ...]:  # fmt: skip
    """The configs that `lookup` may give for the problem in any batch and length, hinted or not: what to compile ahead.

    Memoised for the problem without its batch and length; `legal` is asked for the first of them.
    """
    question = _Question(_Cell.of(problem), legal, revisions, toolchain)
    index, asked = _index(target, problem.op), question.asked
    kind = _hard(problem), asked.soft, asked.wish, asked.shape[1:3], toolchain, tuple(sorted(revisions.items()))
    if kind not in index.reachable:
        pools = index.pools.get(_hard(problem), ())
        found = {config for pool in pools for config in question.reachable(pool)}
        index.reachable[kind] = tuple(sorted(found, key=lambda config: (config.variant, *_simplest(config))))
    return index.reachable[kind]


def robust(trials: Iterable[Trial]) -> Config | None:
    """The config with the least worst ratio to the fastest, over the lengths at which it was timed; None if only one.

    Only configs that were timed at the most lengths count: of the others the worst case is not known. Of a config's
    times at a length the one of the most effort counts, of a length the best of the most effort.
    """
    cells: dict[tuple[object, _Cell], dict[Config, tuple[int, float]]] = {}
    for problem, group in itertools.groupby(trials, key=lambda trial: trial.problem):
        times = cells.setdefault((_hard(problem), _Cell.of(problem)), {})
        for trial in group:
            if trial.median_us is not None:
                time = -trial.effort, trial.median_us
                times[trial.config] = min(time, times.get(trial.config, time))
    ratios: dict[Config, list[float]] = {}
    lengths: dict[Config, set[int]] = {}
    for (_, cell), times in cells.items():
        kv, (_, best) = cell.shape[3], min(times.values(), default=(0, 0.0))
        for config, (_, time_us) in times.items():
            ratios.setdefault(config, []).append(time_us / best if best > 0 else 1.0)
            lengths.setdefault(config, set()).add(kv)
    most = max(map(len, ratios.values()), default=0)
    widest = [config for config in ratios if len(ratios[config]) == most and len(lengths[config]) > 1]
    return min(widest, key=lambda config: (max(ratios[config]), *_simplest(config)), default=None)


def forget() -> None:
    """The next lookup reads the user's database and the shipped rows again."""
    _indexes.clear()
    _shipped.clear()


def _index(target: Target, op: str) -> _Index:
    """Read once, and again when the user's database has changed."""
    path = user_path()
    signature = (path, _signature(str(path)), _signature(f"{path}-wal"))
    key = target.device, op, target.name
    held = _indexes.get(key)
    if held is not None and held.signature == signature:
        return held
    rows = [_Row(trial, False) for trial in (_users(path, target, op) if signature[1] is not None else ())]
    rows += [
        _Row(trial, True) for trial in shipped(target.device, op)
        if trial.status == OK and (trial.device, trial.target) == (target.device, target.name)
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[bool, list[_Row]]] = {}
    for row in rows:
        predicted = row.trial.provenance == PROVENANCES[-1]
        groups.setdefault(_hard(row.trial.problem), {}).setdefault(predicted, []).append(row)
    found = {hard: [_Pool(group[predicted]) for predicted in sorted(group)] for hard, group in groups.items()}
    _indexes[key] = _Index(signature, found)
    return _indexes[key]


def _signature(path: str) -> object:
    """What changes when a file does; None for one that is not there, or is empty as a log is after its checkpoint."""
    try:
        seen = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)
    return (seen.st_ino, seen.st_mtime_ns, seen.st_size) if seen.st_size else None


def _users(path: Path, target: Target, op: str) -> list[Trial]:
    """The user's good trials for a device; what cannot be read is skipped, with one warning."""
    bad: list[InvalidInput] = []
    try:
        with Store(path, readonly=True, timeout_s=_LOOKUP_TIMEOUT_S) as store:
            records = store._select("trials", {"device": target.device, "op": op, "target": target.name, "status": OK})
        found = list(_trials(records, bad.append))
    except StoreError as error:
        layers.warn_once(f"tuning database {path}", f"mla_jit does without its user's tuning rows: {error}")
        return []
    if bad:
        layers.warn_once(f"rows of {path}", f"mla_jit skips {len(bad)} rows of {path}, the first: {bad[0]}")
    return found
