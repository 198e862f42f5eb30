"""The user's tuning database, an SQLite file: table `trials`, a row a trial, never changed; view `best`.

It lies at <user's cache directory>/tuning.db unless the setting `tuning_db` says otherwise. SQLite is imported when a
database is opened, torch never. Times in µs, lengths in tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_jit import settings
from mla_jit.compile import layers, locks
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, StoreError
from mla_jit.tuning.rows import MOST_NOISE, NOISE, OK, PROBLEMS, Trial

if TYPE_CHECKING:
    import sqlite3

    from sqlite_utils import Database


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
    "total_kv", "num_kv_splits", "groups", "median_us", "spread_us", "default_us", "rel_l2", "registers", "spill_bytes",
    "smem_bytes",
}  # fmt: skip


def _version_1(db: Database) -> None:
    columns = {"id": int, "content": str, **_PROBLEM_1, "variant": str, "config": str, **_TRIAL_1}
    db.execute(db.create_table_sql("trials", columns, pk="id", not_null=set(columns) - _NULLABLE - {"id"}))
    db.execute("CREATE UNIQUE INDEX trials_content ON trials (content)")
    db.execute("CREATE INDEX trials_device_op ON trials (device, op, num_heads, batch, max_kv_len)")
    _make_best(db, tuple(_PROBLEM_1))


def _make_best(db: Database, problem: tuple[str, ...]) -> None:
    """The view, for a table in which a problem has these columns."""
    # Of a problem on a device: of each variant only its newest revision; predictions after all measurements, and the
    # search's short ones after the playoff's.
    columns = ("id", "content", *problem, "variant", "config", *_TRIAL_1)
    group = ", ".join((*problem, "target", "device"))
    newest = f"max(revision) OVER (PARTITION BY {group}, variant, provenance = 'predicted')"
    good = f"SELECT *, {newest} AS newest FROM trials WHERE status = '{OK}'"
    order = "provenance = 'predicted', effort DESC, median_us, config, content"
    window = f"(PARTITION BY {group} ORDER BY {order})"
    fastest = ", ".join(
        f"first_value({name}) OVER {window} AS best_{name}"
        for name in ("provenance", "effort", "median_us", "spread_us")
    )
    ranked = f"SELECT *, {fastest} FROM ({good}) WHERE revision = newest"
    # rows.preferred, in SQL: of what the noise cannot tell from the fastest, the simplest.
    spread = "max(coalesce(spread_us, 0), coalesce(best_spread_us, 0))"
    noise = f"min({NOISE} * {spread}, {MOST_NOISE} * best_median_us)"
    alike = "effort = best_effort AND (provenance = 'predicted') = (best_provenance = 'predicted')"
    simplest = "coalesce(json_extract(config, '$.num_kv_splits'), 0), config, content"
    place = f"row_number() OVER (PARTITION BY {group} ORDER BY {simplest})"
    ties = f"SELECT *, {place} AS place FROM ({ranked}) WHERE {alike} AND median_us - best_median_us <= {noise}"
    db.execute(f"CREATE VIEW best AS SELECT {', '.join(columns)} FROM ({ties}) WHERE place = 1")


def _version_2(db: Database) -> None:
    """A problem's scheduler, and whether its list is the caller's; older rows asked for none."""
    db.execute("ALTER TABLE trials ADD COLUMN scheduler TEXT NOT NULL DEFAULT 'auto'")
    db.execute("ALTER TABLE trials ADD COLUMN planned INTEGER NOT NULL DEFAULT 0")
    db.execute("DROP VIEW best")
    _make_best(db, (*_PROBLEM_1, "scheduler", "planned"))


def _version_3(db: Database) -> None:
    """How a problem's lengths are distributed, and for how many groups its list is made; older rows: log-uniform."""
    db.execute("ALTER TABLE trials ADD COLUMN mix TEXT NOT NULL DEFAULT 'log-uniform'")
    db.execute("ALTER TABLE trials ADD COLUMN groups INTEGER")
    db.execute("DROP VIEW best")
    _make_best(db, (*_PROBLEM_1, "scheduler", "planned", "groups", "mix"))


# Columns of version 4: of a prefill problem, NULL in a decode's row. Where a column of decode must not be NULL a
# prefill's row has 0 or "".
_PREFILL_4: dict[str, str] = {
    "qk_dim": "INTEGER", "v_dim": "INTEGER", "k_scale": "INTEGER", "v_scale": "INTEGER", "token_major": "INTEGER",
    "total_q": "INTEGER",
}  # fmt: skip


def _version_4(db: Database) -> None:
    """Rows of prefill."""
    for name, kind in _PREFILL_4.items():
        db.execute(f"ALTER TABLE trials ADD COLUMN {name} {kind}")
    db.execute("DROP VIEW best")
    _make_best(db, (*_PROBLEM_1, "scheduler", "planned", "groups", "mix", *_PREFILL_4))


# The function at place n takes a database of version n to n + 1; the version stands in PRAGMA user_version. They run in
# one transaction, so by `execute`: what else changes a schema in sqlite-utils 3 commits.
MIGRATIONS: tuple[Callable[[Database], None], ...] = (_version_1, _version_2, _version_3, _version_4)

_KINDS: tuple[Any, ...] = tuple(kind for kind in PROBLEMS.values() if kind.TUNED)
PROBLEM_COLUMNS = tuple(dict.fromkeys(f.name for kind in _KINDS for f in dataclasses.fields(kind)))
_OWN = {kind.op: {f.name for f in dataclasses.fields(kind)} for kind in _KINDS}  # columns, by op
_FOREIGN = {op: set(PROBLEM_COLUMNS) - own for op, own in _OWN.items()}
_TRIAL = tuple(f.name for f in dataclasses.fields(Trial) if f.name not in ("problem", "config"))
_COLUMNS = (*PROBLEM_COLUMNS, "config", *_TRIAL)
_BOOLS = {f.name for kind in _KINDS for f in dataclasses.fields(kind) if f.type == "bool"}
_TUPLES = {f.name for kind in _KINDS for f in dataclasses.fields(kind) if str(f.type).startswith("tuple")}
_FLOATS = {f.name for f in dataclasses.fields(Trial) if str(f.type).startswith("float")}
_INTS = {
    f.name for c in (*_KINDS, Trial) for f in dataclasses.fields(c) if str(f.type).startswith("int")
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
        own = _OWN[trial.op]
        problem = [
            _sql(name, getattr(trial.problem, name)) if name in own else _absent(name) for name in PROBLEM_COLUMNS
        ]
        return (*problem, trial.config.to_json(), *(_sql(name, getattr(trial, name)) for name in _TRIAL))
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"no tuning row: {error}") from error


def _absent(name: str) -> int | str | None:
    """What the column of another op's field has."""
    if name in _NULLABLE or name in _PREFILL_4:
        return None
    return 0 if name in _INTS else ""


def read_trials(
    records: Iterable[tuple[Any, ...]], bad: Callable[[InvalidInput], None] | None = None
) -> Iterator[Trial]:  # fmt: skip
    """Trials of records in the order of _COLUMNS. What is none goes to `bad`, or raises InvalidInput."""
    problems: dict[tuple[Any, ...], Any] = {}
    configs: dict[str, Config] = {}
    n = len(PROBLEM_COLUMNS)
    for record in records:
        try:
            if (problem := problems.get(record[:n])) is None:
                fields = dict(zip(PROBLEM_COLUMNS, record, strict=False))
                fields = {name: value for name, value in fields.items() if name in _OWN[fields["op"]]}
                fields |= {name: bool(fields[name]) for name in _BOOLS & set(fields)}
                fields |= {
                    name: tuple(fields[name].split(",")) if fields[name] else () for name in _TUPLES & set(fields)
                }
                problem = problems[record[:n]] = PROBLEMS[fields["op"]](**fields)
            if (config := configs.get(record[n])) is None:
                config = configs[record[n]] = Config.from_json(record[n])
            yield Trial(problem=problem, config=config, **dict(zip(_TRIAL, record[n + 1 :], strict=True)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fault = InvalidInput(f"no tuning row: {error!r} in {str(record)[:120]}")
            if bad is None:
                raise fault from error
            bad(fault)


def plain(trial: Trial) -> Trial:
    """The trial as it comes back from a column or a line: 8 → 8.0, NaN → None. InvalidInput for what is none."""
    return trial if _is_plain(trial) else next(read_trials([_record(trial)]))


def _is_plain(trial: Trial) -> bool:
    """Whether each value is of its column's own type, so that it comes back as it is."""
    if not all(type(value) in (int, str, bool) for _, value in trial.config.items_):
        return False
    problem = trial.problem
    for thing, kinds in ((trial, _TRIAL_TYPES), (problem, _TYPES[problem.op])):
        for name, kind in kinds:
            value: Any = getattr(thing, name)
            if value is None or (kind is tuple and value == ()):
                continue
            if kind is tuple or type(value) is not kind or (kind is float and not math.isfinite(value)):
                return False
    return True


def _type(name: str) -> type:
    if name in _TUPLES:
        return tuple
    return bool if name in _BOOLS else int if name in _INTS else float if name in _FLOATS else str


_Kinds = tuple[tuple[str, Any], ...]  # of thousands of rows
_TRIAL_TYPES: _Kinds = tuple((name, _type(name)) for name in _TRIAL)
_TYPES: dict[str, _Kinds] = {op: tuple((name, _type(name)) for name in own) for op, own in _OWN.items()}


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
        self._check_writable()
        rows = []
        for trial in map(plain, trials):
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

    def remove(self, chosen: Callable[[Trial], bool]) -> list[Trial]:
        """Removes the trials for which `chosen` is true, in one transaction; these. A row that is no trial stays."""
        self._check_writable()
        found: list[tuple[int, Trial]] = []
        with _guard, _told(self.path), _transaction(self._open()) as connection:
            for number, *record in connection.execute(f"SELECT id, {', '.join(_COLUMNS)} FROM trials ORDER BY id"):
                found += [(number, trial) for trial in read_trials([tuple(record)], lambda _: None) if chosen(trial)]
            connection.executemany("DELETE FROM trials WHERE id = ?", [(number,) for number, _ in found])
        return [trial for _, trial in found]

    def vacuum(self) -> None:
        """Gives the space of removed trials back to the file system; needs as much again while it works."""
        self._check_writable()
        with _guard, _told(self.path):
            self._open().execute("VACUUM")

    def trials(self, **filters: Any) -> Iterator[Trial]:
        """The trials in the order of their adding; of them those whose columns have these values.

        A filter is a column of the table (a problem's fields, `variant`, `config`, `device`, `status`, …), or `problem`
        for all of a problem's. InvalidInput for an unknown one.
        """
        return read_trials(self._select("trials", filters))

    def best(self, **filters: Any) -> Iterator[Trial]:
        """The view `best`: a problem's fastest good trial a device. `filters` as for `trials`."""
        return read_trials(self._select("best", filters))

    def close(self) -> None:
        """Closes the connection; another use opens it again."""
        with _guard:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _check_writable(self) -> None:
        if self.readonly:
            raise StoreError(f"the tuning database {self.path} was opened for reading; open it without readonly")

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
            wal = not locks.on_network(self.path)
            _set_journal(connection, "wal" if wal else "delete", self.timeout_s)
            if wal:  # a killed process loses nothing, a power failure at most the last transactions
                connection.execute("PRAGMA synchronous = NORMAL")
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
                    f"{len(MIGRATIONS)}; open it once for writing (`mla-tune run`, or Store(path)), which brings it "
                    "up to date"
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
