"""The tuning database among processes and across versions, the shipped rows, and what a lookup finds in both."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mla_jit import resources, settings, target
from mla_jit.compile import layers, locks
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, StoreError
from mla_jit.problem import DecodeProblem, PrefillProblem
from mla_jit.tuning import lookup, shipped, store
from mla_jit.tuning.rows import Trial, slug
from mla_jit.tuning.store import Store

ROOT = Path(__file__).parents[2]
TARGET = dataclasses.replace(target.by_name("cpu"), device="Device 1")
REVISIONS = {"one": 3, "two": 1}
NOW = "triton 9.9"


def problem(**fields) -> DecodeProblem:
    return DecodeProblem(**({"num_heads": 16, "batch": 8, "max_kv_len": 4096} | fields))


def config(n: int = 1, variant: str = "one", **values) -> Config:
    return Config.of(variant, **({"block_n": 64, "num_kv_splits": n} | values))


def trial(median_us: float | None = 10.0, *, c: Config | None = None, **fields) -> Trial:
    """A good trial of `config()` for `problem()`; fields of Trial, or of its problem."""
    mine = {f.name for f in dataclasses.fields(Trial)}
    sizes = {name: fields.pop(name) for name in list(fields) if name not in mine}
    plain = {"target": "cpu", "device": "Device 1", "revision": 3, "toolchain": NOW}
    return Trial(problem=problem(**sizes), config=config() if c is None else c, median_us=median_us, **(plain | fields))


@pytest.fixture
def db(tmp_path):
    """The path of the user's database, not made yet; nothing shipped, nothing remembered."""
    lookup.forget()
    (tmp_path / "data" / "tuning_db").mkdir(parents=True)
    with settings.scope(tuning_db=tmp_path / "home" / "tuning.db"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "PACKAGE", tmp_path / "data" / "package")
        yield tmp_path / "home" / "tuning.db"
    lookup.forget()


def ship(trials) -> Path:
    path = resources.PACKAGE.parent / "tuning_db" / "device_1" / "decode.jsonl"
    shipped.export(trials, path)
    lookup.forget()
    return path


def sql(path: Path, query: str) -> list[tuple]:
    """What SQLite itself says of a database."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def look(legal=lambda config: None, *, hinted=True, toolchain=NOW, **sizes):
    return lookup.lookup(problem(**sizes), TARGET, legal, REVISIONS, toolchain, hinted=hinted)


# -------------------------------------------------------------------------------------------------------------- Store

FULL = trial(
    10.25, c=config(7, tma=True, scheme="a b"), spread_us=0.5, default_us=12.0, rel_l2=1e-3, registers=255,
    spill_bytes=0, smem_bytes=65536, source_hash="ab", driver="580", torch="2.11", effort=1, policy="p", command="c",
    provenance="imported", created="2026-11-24T00:00:00", misaligned=("kv", "q"), index64=("table",), total_kv=8192,
    num_kv_splits=3, causal=False, soft_cap=True,
)  # fmt: skip
FAULT = trial(None, status="illegal_access", note="'quoted', \"twice\"\nand × lines", misaligned=())


def test_a_trial_comes_back_as_it_was(db):
    with Store(db) as s:
        assert s.add([FULL, FAULT]) == 2
        assert list(s.trials()) == [FULL, FAULT]
        assert [type(x) for x in (FULL.problem.causal, next(s.trials()).problem.causal)] == [bool, bool]


def test_the_columns_are_the_fields(db):
    """A new field wants a migration: a function more in MIGRATIONS, and only then a column here."""
    Store(db).close()
    columns = {row[1] for row in sql(db, "PRAGMA table_info(trials)")}
    fields = {f.name for c in (DecodeProblem, PrefillProblem, Trial) for f in dataclasses.fields(c)} - {"problem"}
    assert columns == fields | {"id", "content", "variant"}


def test_the_same_trial_is_one_row_also_after_a_merge(db):
    other = db.with_name("other.db")
    rows = [trial(10.0 + i, c=config(i + 1)) for i in range(4)]
    with Store(db) as mine, Store(other) as theirs:
        assert mine.add([*rows[:3], rows[0]]) == 3
        assert mine.add(rows[:3]) == 0
        theirs.add(rows[:1:-1])
        assert mine.merge(other) == 1
        assert mine.merge(other) == 0
        assert theirs.merge(db) == 2
        ids = [[row[0] for row in sql(path, "SELECT content FROM trials ORDER BY content")] for path in (db, other)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 4


def test_numbers_of_another_type_make_no_other_row(db):
    with Store(db) as s:
        assert s.add([trial(10), trial(10.0), trial(10.0, rel_l2=float("nan")), trial(10.0, causal=1)]) == 1
        assert next(s.trials()).rel_l2 is None


@pytest.mark.parametrize("bad", [trial(float("nan")), trial(float("inf")), trial(note=3), trial(c=config(1, x=1.5))])
def test_what_is_no_row_is_refused_and_nothing_of_its_batch_added(db, bad):
    with Store(db) as s:
        with pytest.raises(InvalidInput):
            s.add([trial(), bad])
        assert list(s.trials()) == []


def test_filters(db):
    with Store(db) as s:
        s.add([FULL, FAULT, trial(11.0, c=config(variant="two"))])
        assert list(s.trials(status="illegal_access")) == [FAULT]
        assert list(s.trials(misaligned=("kv", "q"), causal=False)) == [FULL]
        assert [t.variant for t in s.trials(total_kv=None, status="ok")] == ["two"]
        assert list(s.trials(config=FULL.config)) == [FULL]
        assert list(s.trials(problem=FULL.problem, device="Device 1")) == [FULL]
        with pytest.raises(InvalidInput, match="no column nonsense; it has variant, op"):
            s.trials(nonsense=1)


def test_best_is_of_the_newest_revision_of_each_variant_and_measured(db):
    rows = [
        trial(1.0, revision=2),  # the template has changed since
        trial(12.0),
        trial(11.0, c=config(2)),
        trial(11.5, c=config(variant="two"), revision=1),
        trial(2.0, c=config(3), provenance="predicted", revision=9),
        trial(3.0, c=config(4), effort=0),
        trial(None, c=config(5), status="wrong"),
        trial(20.0, batch=9, c=config(6)), trial(20.0, batch=9, c=config(3)),
        trial(30.0, device="Device 2"),
    ]  # fmt: skip
    with Store(db) as s:
        s.add(rows)
        best = [(t.problem.batch, t.device, t.median_us, t.config.int("num_kv_splits")) for t in s.best()]
        assert best == [(8, "Device 1", 11.0, 2), (9, "Device 1", 20.0, 3), (8, "Device 2", 30.0, 1)]
        assert [t.device for t in s.best(device="Device 2")] == ["Device 2"]


def test_it_opens_as_a_plain_database(db):
    with Store(db) as s:
        s.add([FULL])
    with contextlib.closing(sqlite3.connect(db)) as plain:
        plain.row_factory = sqlite3.Row
        (row,), (best,) = (plain.execute(f"SELECT * FROM {name}").fetchall() for name in ("trials", "best"))
    assert (row["misaligned"], row["index64"], row["causal"], row["variant"]) == ("kv,q", "table", 0, "one")
    assert json.loads(row["config"]) == {
        "variant": "one",
        "block_n": 64,
        "num_kv_splits": 7,
        "tma": True,
        "scheme": "a b",
    }
    assert dict(best) == dict(row)


def test_what_is_made_is_private(db):
    before = os.umask(0)
    try:
        with Store(db.parent / "deep" / "tuning.db") as s:
            s.add([trial()])
            modes = {stat.S_IMODE(p.stat().st_mode) for p in s.path.parent.iterdir()}
            assert modes == {0o600}  # of its -wal and -shm too
            assert {stat.S_IMODE(p.stat().st_mode) for p in (s.path.parent, db.parent)} == {0o700}
    finally:
        os.umask(before)


@pytest.mark.parametrize(("network", "mode"), [(False, "wal"), (True, "delete")])
def test_the_journal_goes_by_the_file_system(db, monkeypatch, network, mode):
    with Store(db) as s:
        s.add([trial()])
    monkeypatch.setattr(locks, "on_network", lambda path: network)
    with Store(db) as s:  # a database that was local before
        assert sql(db, "PRAGMA journal_mode") == [(mode,)]
        assert s.add([trial(11.0)]) == 1
    with Store(db, readonly=True) as s:
        assert len(list(s.trials())) == 2


# ----------------------------------------------------------------------------------------------------------- versions


def test_rows_of_version_2_are_of_log_uniform_lengths(db, monkeypatch):
    """As they were timed; a list, where the caller brought one, was for as many groups as the config says."""
    names = [name for name in store._COLUMNS if name not in ("mix", "groups", *store._PREFILL_4)]
    ragged = trial(12.0, total_kv=8 * 512)
    record = dict(zip(store._COLUMNS, store._record(ragged), strict=True))
    with monkeypatch.context() as older:
        older.setattr(store, "MIGRATIONS", store.MIGRATIONS[:2])
        Store(db).close()
    columns = ", ".join(["content", "variant", *names])
    values = ["x", ragged.variant, *(record[name] for name in names)]
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute(f"INSERT INTO trials ({columns}) VALUES ({', '.join('?' * len(values))})", values)
        connection.commit()
    with Store(db) as s:
        assert list(s.trials()) == list(s.best()) == [ragged]
        assert ragged.problem.mix == "log-uniform"
        uniform = trial(13.0, total_kv=8 * 512, mix="uniform")
        s.add([uniform])
        assert list(s.trials(mix="uniform")) == [uniform]
        assert len(list(s.best())) == 2  # problems of their own


def test_shipped_rows_say_nothing_of_the_mix_that_all_had():
    assert '"mix"' not in trial(12.0, total_kv=8 * 512).to_json()
    line = trial(12.0, total_kv=8 * 512, mix="one-long").to_json()
    assert '"mix": "one-long"' in line
    assert Trial.from_json(line).problem.mix == "one-long"


def test_migration_of_an_older_version(db, monkeypatch):
    with Store(db) as s:
        s.add([trial(), FULL])

    n = len(store.MIGRATIONS)

    def one_more(database) -> None:
        database.execute("ALTER TABLE trials ADD COLUMN mood TEXT")
        database.execute("UPDATE trials SET mood = 'good'")

    def broken(database) -> None:
        database.execute("DROP TABLE trials")
        raise sqlite3.OperationalError("no space left")

    monkeypatch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, one_more, broken))
    with pytest.raises(StoreError, match="no space left"):
        Store(db)
    monkeypatch.setattr(store, "MIGRATIONS", store.MIGRATIONS[:-1])
    with pytest.raises(StoreError, match=f"has schema version {n}, this mla_jit has {n + 1}; open it once for writing"):
        Store(db, readonly=True)
    for _ in range(2):
        with Store(db) as s:
            assert list(s.trials()) == [trial(), FULL]
    assert sql(db, "SELECT DISTINCT mood FROM trials") == [("good",)]
    monkeypatch.setattr(store, "MIGRATIONS", store.MIGRATIONS[:-1])
    for readonly in (False, True):
        with pytest.raises(StoreError, match=f"has schema version {n + 1}, this mla_jit knows {n}; update mla_jit"):
            Store(db, readonly=readonly)


def test_what_cannot_be_opened_says_why_and_what_to_do(db, tmp_path):
    with pytest.raises(StoreError, match="there is no tuning database"):
        Store(db, readonly=True)
    db.parent.mkdir()
    db.write_bytes(b"not sqlite at all " * 100)
    with pytest.raises(StoreError, match=r"not a database\. It is damaged; move it aside"):
        Store(db)
    foreign = tmp_path / "places.sqlite"
    sql(foreign, "CREATE TABLE cookies (x)")
    sql(foreign, "PRAGMA user_version = 77")
    before = foreign.read_bytes()
    with pytest.raises(StoreError, match="another program; set MLA_JIT_TUNING_DB"):
        Store(foreign)
    assert foreign.read_bytes() == before
    with pytest.raises(StoreError, match="See to its directory's permissions"):
        Store(foreign / "tuning.db")
    with Store(tmp_path / "new.db"), pytest.raises(StoreError, match="opened for reading"):
        Store(tmp_path / "new.db", readonly=True).add([trial()])


def test_reading_where_nothing_can_be_written(db, monkeypatch):
    """`immutable` only there, and only without a journal: with one, the file alone is not the database."""
    with Store(db) as s:
        s.add([trial()])
    seen = []
    connect = store._connect
    monkeypatch.setattr(
        store, "_connect", lambda path, mode, timeout_s: seen.append(mode) or connect(path, mode, timeout_s)
    )
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != db.parent and access(path, mode))
    before = set(db.parent.iterdir())
    with Store(db, readonly=True) as s:
        assert list(s.trials()) == [trial()]
        assert set(db.parent.iterdir()) == before
    with Store(db) as writer:
        writer.add([trial(11.0)])
        with Store(db, readonly=True) as s:
            assert len(list(s.trials())) == 2
    assert seen == ["mode=ro&immutable=1", "mode=rw", "mode=ro"]


def test_a_database_that_another_holds_is_told(db):
    with Store(db, timeout_s=0.1) as s:
        holder = sqlite3.connect(db, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked\. Another process has been writing for long"):
            s.add([trial()])
        assert list(s.trials()) == []
        holder.close()
        assert s.add([trial()]) == 1


# ---------------------------------------------------------------------------------------------------------- processes

CHILD = """
import os, random, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from mla_jit.compile import locks
from mla_jit.tuning import store
locks.on_network = lambda path: {network}
from test_store import Store, config, trial
path = Path({path!r})
"""


def run(code: str, path: Path, network: bool) -> str:
    code = CHILD.format(root=str(ROOT), tests=str(Path(__file__).parent), network=network, path=str(path)) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("network", [False, True], ids=["wal", "journal"])
def test_sixteen_writers_at_once_lose_no_row(db, network):
    """They also make the database at once. Each is forked from a process that has another database open."""
    code = """
import sqlite_utils  # once, before the forks
other = Store(path.with_name("other.db"))
other.add([trial()])
children = []
for writer in range(16):
    if not (pid := os.fork()):
        with Store(path) as mine:
            for i in range(8):
                assert mine.add([trial(10.0, c=config(writer * 100 + i)), trial(10.0, c=config(7777))]) >= 1
        assert other.add([trial(11.0, c=config(writer))]) == 1
        os._exit(0)
    children.append(pid)
other.add([trial(12.0)])
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
print(len(list(other.trials())))
"""
    assert run(code, db, network) == "18\n"
    with Store(db, readonly=True) as s:
        splits = [t.config.int("num_kv_splits") for t in s.trials()]
    assert sorted(splits) == sorted([7777, *(writer * 100 + i for writer in range(16) for i in range(8))])
    assert sql(db, "PRAGMA integrity_check") == [("ok",)]


def test_a_fork_shares_no_connection(db):
    """With a shared one the parent, closing, deletes the log that the child goes on writing."""
    code = """
mine = Store(path)
mine.add([trial(1.0)])
done, go = os.pipe(), os.pipe()
if not (pid := os.fork()):
    mine.add([trial(2.0)])
    os.write(done[1], b".")
    os.read(go[0], 1)
    mine.add([trial(3.0)])
    os._exit(0)
os.read(done[0], 1)
mine.add([trial(4.0)])
mine.close()
os.write(go[1], b".")
assert os.waitpid(pid, 0)[1] == 0
print(sorted(t.median_us for t in mine.trials()))
"""
    assert run(code, db, network=False) == "[1.0, 2.0, 3.0, 4.0]\n"


@pytest.mark.parametrize("network", [False, True], ids=["wal", "journal"])
def test_a_writer_killed_at_any_moment_leaves_whole_trials(db, network):
    """From the making of the file on; what was reported as added is there, and of a batch all or nothing."""
    code = """
import sqlite_utils
rng, told = random.Random(1), 0
for attempt in range(24):
    read, write = os.pipe()
    if not (pid := os.fork()):
        mine = Store(path)
        for i in range(10000):
            mine.add(trial(10.0 + part, c=config(attempt * 10000 + i)) for part in range(20))
            os.write(write, b".")
        os._exit(1)
    os.close(write)
    time.sleep(rng.uniform(0.0, 0.06))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    told += len(os.read(read, 100000))
    os.close(read)
    if path.exists() and attempt % 2:
        with Store(path, readonly=True) as there:  # its first reader finds what the killed one left
            assert len(list(there.trials())) >= 20 * told
print(told)
"""
    told = int(run(code, db, network))
    assert told > 5
    assert sql(db, "PRAGMA integrity_check") == [("ok",)]
    with Store(db) as s:
        batches: dict[int, set[float]] = {}
        for t in s.trials():
            batches.setdefault(t.config.int("num_kv_splits"), set()).add(t.median_us)
        assert all(batch == {10.0 + part for part in range(20)} for batch in batches.values())
        assert told <= len(batches) <= told + 24
        assert s.add([trial()]) == 1


def test_a_hot_journal_is_rolled_back_by_a_reader(db, monkeypatch):
    """What a writer on a network file system leaves when it is killed inside a commit."""
    monkeypatch.setattr(locks, "on_network", lambda path: True)
    with Store(db) as s:
        s.add(trial(10.0 + i) for i in range(200))
    copies = {}
    writer = sqlite3.connect(db, isolation_level=None)
    writer.execute("PRAGMA cache_size = 1")  # spills pages into the file before the commit
    writer.execute("BEGIN")
    writer.execute("UPDATE trials SET median_us = 0, note = hex(zeroblob(3000))")
    for path in (db, db.with_name("tuning.db-journal")):
        copies[path.name] = path.read_bytes()
    writer.close()
    there = db.parent / "killed"
    there.mkdir()
    for name, data in copies.items():
        (there / name).write_bytes(data)
    with Store(there / "tuning.db", readonly=True) as s:
        assert [t.median_us for t in s.trials()] == [10.0 + i for i in range(200)]


# ------------------------------------------------------------------------------------------------------- shipped rows


def test_export_sorts_and_is_read_back(db):
    rows = [trial(10.0 + i, batch=b, c=config(i)) for b in (64, 8, 128) for i in (2, 1)]
    path = ship([*rows, *rows])
    text = path.read_text()
    assert [json.loads(line)["problem"]["batch"] for line in text.splitlines()] == [8, 8, 64, 64, 128, 128]
    assert ship(reversed(rows)).read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["decode.jsonl"]
    assert set(shipped.rows("Device 1", "decode")) == set(rows)
    assert shipped.rows("Device 1", "prefill") == shipped.rows("Device 2", "decode") == ()
    assert shipped.check(path) == []


def test_an_export_that_fails_leaves_the_old_file(db, monkeypatch):
    path = ship([trial()])
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        shipped.export([trial(11.0)], path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


GOOD = [trial(10.0, batch=4).to_json(), trial(10.0, batch=8).to_json()]
BAD = {
    "no JSON": ('{"problem"', "line 3: no tuning row"),
    "blank": ("", "line 3: no tuning row"),
    "no trial": ('{"problem": {"op": "decode", "num_heads": 0}}', "line 3: no tuning row"),
    "other op": (GOOD[0].replace('"op": "decode"', '"op": "sort"'), "line 3: no tuning row"),
    "words": (GOOD[0].replace("10.0", '"fast"'), "line 3: no tuning row"),
    "NaN": (GOOD[0].replace("10.0", "NaN"), "line 3: no tuning row"),
    "bytes": (b"\xff\xfe", "line 3: 'utf-8' codec"),
    "repeated": (GOOD[1], "line 3: repeats line 2"),
    "contradictory": (GOOD[1].replace("10.0", "11.0"), "line 3: contradicts line 2"),
    "misplaced": (GOOD[0].replace("Device 1", "Device 2"), "line 3: belongs to device_2/decode.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_listed_for_ci_and_skipped_with_one_warning(db, name):
    line, fault = BAD[name]
    path = ship([])
    path.write_bytes(b"\n".join([*(x.encode() for x in GOOD), line if isinstance(line, bytes) else line.encode(), b""]))
    (found,) = shipped.check(path)
    assert found.startswith(fault)
    with pytest.warns(UserWarning, match="1, the first: line 3") as warned:
        assert [t.to_json() for t in shipped.rows("Device 1", "decode")] == GOOD
    assert look(batch=8).provenance == "measured"  # without another warning
    assert len(warned) == 1


def test_ci_also_wants_rows_sorted_and_spelt_as_exported(db):
    path = ship([])
    path.write_text(f"{GOOD[1]}\n{GOOD[0].replace(', ', ',')}\n")
    assert shipped.check(path) == [
        "line 2: not spelt as `export` writes it", "line 2: out of order; `export` sorts",
    ]  # fmt: skip
    assert len(shipped.rows("Device 1", "decode")) == 2


def test_the_shipped_files_are_whole():
    for path in sorted((ROOT / "tuning_db").glob("*/decode.jsonl")):
        assert shipped.check(path) == [], path
        assert path.parent.name == slug(path.parent.name)


# ------------------------------------------------------------------------------------------------------------- lookup


def test_a_lookup_makes_nothing_and_loads_no_sqlite(db):
    code = f"""
import sys
from mla_jit import settings
from mla_jit.problem import DecodeProblem, PrefillProblem
from mla_jit.target import by_name
from mla_jit.tuning import lookup
settings.configure(tuning_db=__import__("pathlib").Path({str(db)!r}))
print(lookup.lookup(DecodeProblem(num_heads=3), by_name("cpu"), lambda c: None, {{}}, ""))
print({{m for m in sys.modules if m.split(".")[0] in ("sqlite3", "sqlite_utils", "torch", "numpy")}})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout == "None\nset()\n", done.stderr
    assert not db.parent.exists()


def test_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.user_path() == tmp_path / "mla_jit" / "tuning.db"
    assert settings.Settings.from_env({"MLA_JIT_TUNING_DB": "/x/y.db"}).tuning_db == Path("/x/y.db")


def test_the_problem_itself(db):
    ship([trial(10.0, c=config(2)), trial(9.0, c=config(3), provenance="predicted")])
    found = look()
    assert (found.config, found.provenance, found.trial.median_us) == (config(2), "measured", 10.0)
    assert found.why == "shipped row of this problem: measured, 10.00 us"
    assert look(max_kv_len=4000).provenance == "measured"  # the same bucket
    ship([trial(10.0, c=config(2), provenance="imported")])
    assert look().provenance == "imported"
    with Store(db) as s:
        s.add([trial(30.0, c=config(5)), trial(30.0, c=config(4)), trial(None, c=config(1), status="wrong")])
    found = look()  # the user's, though slower; of equals the fewest splits
    assert (found.config, found.why) == (config(4), "the user's row of this problem: measured, 30.00 us")


def test_nothing_of_another_target_device_or_hard_field_is_found(db):
    ship([trial(10.0, target="sm_90")])
    with Store(db) as s:
        s.add([trial(device="Device 2"), trial(target="sm_90"), trial(None, status="hang")])
    assert look() is None
    ship([trial()])
    assert look() is not None
    others = {
        "kv_lora_rank": 256, "rope_dim": 32, "num_kv_heads": 2, "q_dtype": "fp16", "kv_dtype": "fp8_e4m3",
        "context_parallel": True, "batch_invariant": True,
    }  # fmt: skip
    for name, value in others.items():
        assert look(**{name: value}) is None, name


def test_stale_rows_are_used_last_and_never_as_measured(db):
    ship([trial(9.0, c=config(2), revision=2), trial(10.0, c=config(3))])
    assert (look().config, look().provenance) == (config(3), "measured")
    found = look(legal=lambda c: "no" if c == config(3) else None)
    assert (found.config, found.provenance) == (config(2), "stale")
    assert found.why.endswith("9.00 us; stale: revision 2, now 3")
    found = look(toolchain="triton 10")
    assert (found.config, found.provenance) == (config(2), "stale")
    assert look(toolchain="triton 10", batch=8, max_kv_len=4096, page_size=16) is not None
    ship([trial(toolchain="triton 8")])
    assert look().why.endswith(f"stale: triton 8, now {NOW}")
    ship([trial(c=config(variant="gone"))])
    assert look() is None


def test_illegal_rows_give_way_to_the_next(db):
    ship([trial(10.0, c=config(2)), trial(11.0, c=config(3)), trial(5.0, c=Config.of("one")), trial(1.0, batch=16)])

    def legal(config):
        return "too many" if config.int("num_kv_splits") == 2 else None  # KeyError for a config without it

    assert look(legal).config == config(3)
    assert look(lambda c: "never") is None
    assert look(lambda c: "no" if c != config(1) else None).provenance == "neighbour"


def test_the_nearest_shape_inside_what_was_measured(db):
    shapes = (1, 1024, 16, 1), (16, 1024, 16, 1), (256, 65536, 128, 4), (16, 8192, 16, 1)
    ship(
        trial(10.0, c=config(n), batch=b, max_kv_len=kv, num_heads=h, q_len=q) for n, (b, kv, h, q) in enumerate(shapes)
    )
    assert look(batch=9, max_kv_len=1024).config == config(1)
    assert look(batch=2, max_kv_len=1024).config == config(0)
    found = look(batch=24, max_kv_len=5000, page_size=16)
    assert (found.config, found.provenance) == (config(3), "neighbour")
    assert found.why == "nearest is a shipped row with batch 16 for 24, page_size 64 for 16: measured, 10.00 us"
    assert look(batch=200, max_kv_len=65536, num_heads=100, q_len=3).config == config(2)
    for beyond in ({"batch": 257}, {"max_kv_len": 65537}, {"max_kv_len": 512}, {"num_heads": 129}, {"q_len": 5}):
        assert look(**beyond) is None, beyond
    assert look(max_kv_len=65536).provenance == "neighbour"


def test_soft_fields_count_after_the_shape(db):
    ship([
        trial(20.0, c=config(1), page_size=16, lse=True),
        trial(30.0, c=config(2), page_size=16),
        trial(1.0, c=config(3), batch=16, page_size=1),
    ])  # fmt: skip
    found = look(page_size=32)
    assert (found.config, found.provenance) == (config(2), "neighbour")
    assert look(page_size=16).provenance == "measured"
    assert look(page_size=1).config == config(2)  # the shape first
    assert look(page_size=16, lse=True).config == config(1)


def test_mean_lengths_and_wishes_for_splits(db):
    ship([trial(10.0, c=config(1), total_kv=8 * 4096), trial(11.0, c=config(2), total_kv=8 * 512)])
    assert (look(total_kv=8 * 512).config, look(total_kv=8 * 512).provenance) == (config(2), "measured")
    assert look(total_kv=8 * 4096).config == config(1)
    found = look(total_kv=8 * 64)
    assert (found.provenance, "mean length 512 for 64" in found.why) == ("neighbour", True)
    assert look(total_kv=8 * 8192).config == config(1)
    assert (look().config, look().provenance) == (config(1), "measured")  # the longest
    found = look(num_kv_splits=4)
    assert (found.provenance, "num_kv_splits None for 4" in found.why) == ("neighbour", True)
    ship([trial(1.0, c=config(3), num_kv_splits=4), trial(10.0, c=config(1))])
    assert (look(num_kv_splits=4).config, look(num_kv_splits=4).provenance) == (config(3), "measured")
    assert look(num_kv_splits=5).config == look().config == config(1)  # timed under another wish says nothing


def test_the_mix_is_told_by_the_hints_alone(db):
    """A call does not know its mix: the row whose mean length is the nearest answers, the default mix among equals."""
    ship([
        trial(10.0, c=config(1), total_kv=8 * 512), trial(11.0, c=config(2), total_kv=8 * 2048, mix="uniform"),
        trial(9.0, c=config(3), total_kv=8 * 512, mix="one-long"),
    ])  # fmt: skip
    assert (look(total_kv=8 * 512).config, look(total_kv=8 * 512).provenance) == (config(1), "measured")
    found = look(total_kv=8 * 2048)
    assert (found.config, found.provenance) == (config(2), "neighbour")
    assert "mix uniform for log-uniform" in found.why
    assert look(total_kv=8 * 512, mix="one-long").config == config(3)


def test_without_hints_the_worst_case_is_over_the_mixes_too(db):
    mixes = {"log-uniform": {1: 10.0, 2: 12.0, 3: 20.0}, "one-long": {1: 30.0, 2: 12.0, 3: 10.0}}
    ship([
        trial(us, c=config(n), total_kv=8 * 512, mix=mix) for mix, times in mixes.items() for n, us in times.items()
    ])  # fmt: skip
    found = look(max_kv_len=131072, hinted=False)
    assert (found.config, found.provenance) == (config(2), "measured")


def test_predicted_rows_come_after_every_measured_one(db):
    with Store(db) as s:
        s.add(
            [trial(1.0, c=config(9), provenance="predicted"), trial(2.0, batch=64, c=config(8), provenance="predicted")]
        )
    assert (look().config, look().provenance) == (config(9), "predicted")
    assert (look(batch=50).config, look(batch=50).provenance) == (config(8), "predicted")
    ship([trial(50.0, batch=4), trial(50.0, batch=16)])
    assert look().provenance == "neighbour"
    assert look(batch=17).provenance == "predicted"


def test_short_measurements_count_after_the_playoff(db):
    with Store(db) as s:
        s.add([trial(5.0, c=config(2), effort=0), trial(10.0, c=config(3)), trial(8.0, c=config(4), effort=1)])
    assert look().config == config(3)
    assert look(lambda c: "no" if c == config(3) else None).config == config(4)


def test_newer_rows_are_seen_without_forget(db):
    with Store(db) as s:
        s.add([trial(10.0, c=config(2))])
        assert look().config == config(2)
        s.add([trial(9.0, c=config(3))])  # the file itself does not change before a checkpoint of its log
        assert look().config == config(3)
    assert look().config == config(3)


def test_a_database_that_cannot_be_read_is_told_once_and_done_without(db, caplog, monkeypatch):
    monkeypatch.setattr(lookup, "_LOOKUP_TIMEOUT_S", 0.1)
    monkeypatch.setattr(layers, "_warned", set())
    monkeypatch.setattr(locks, "on_network", lambda path: True)
    ship([trial(50.0, c=config(7))])
    with Store(db) as s:
        s.add([trial(10.0)])
    holder = sqlite3.connect(db, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    for _ in range(3):
        assert look().config == config(7)
    assert [r.message.count("Another process has been writing") for r in caplog.records] == [1]
    holder.execute("UPDATE trials SET provenance = 'guessed'")
    holder.execute("COMMIT")
    with Store(db) as s:
        s.add([trial(20.0, c=config(2))])
    caplog.clear()
    for _ in range(3):
        assert look().config == config(2)
    assert [r.message.count("skips 1 rows") for r in caplog.records] == [1]
    holder.close()
    db.write_bytes(b"?" * 5000)
    assert look().config == config(7)


def test_a_lookup_takes_microseconds_after_the_first(db):
    shapes = [(b, kv, h) for b in (1, 4, 16, 64, 256) for kv in (1024, 4096, 16384, 65536) for h in (16, 32, 64, 128)]
    rows = [trial(10.0 + i, c=config(i), batch=b, max_kv_len=kv, num_heads=h) for b, kv, h in shapes for i in range(10)]
    with Store(db) as s:
        s.add(rows)
    look()

    def took_us(**sizes) -> float:
        asked, best = problem(**sizes), 1e9
        for _ in range(20):
            started = time.perf_counter()
            assert lookup.lookup(asked, TARGET, lambda c: None, REVISIONS, NOW)
            best = min(best, time.perf_counter() - started)
        return best * 1e6

    exact, neighbour = took_us(batch=64, max_kv_len=4096), took_us(batch=65, max_kv_len=4096)
    assert exact < 300  # about 30 where nothing else runs
    assert neighbour < 5000


# ------------------------------------------------------------------------------------------------------------- robust


def over_lengths(table: dict[int, dict[int, float]], **sizes) -> list[Trial]:
    """Trials by config (splits) and length."""
    return [
        trial(us, c=config(n), max_kv_len=kv, **sizes) for n, times in table.items() for kv, us in times.items()
    ]  # fmt: skip


TABLE = {
    1: {1024: 10.0, 4096: 30.0, 16384: 90.0},  # best at short ones, 3 times the best at long ones
    2: {1024: 12.0, 4096: 22.0, 16384: 36.0},  # never more than 1.2 times
    3: {1024: 20.0, 4096: 20.0, 16384: 30.0},
    4: {1024: 10.0, 4096: 20.0},  # of the long ones nothing is known
}


def test_robust():
    rows = over_lengths(TABLE)
    random.Random(0).shuffle(rows)
    assert lookup.robust(rows) == config(2)
    assert lookup.robust(over_lengths({5: {1024: 1.0}, 6: {1024: 2.0}})) is None
    assert lookup.robust([]) is None
    assert lookup.robust(over_lengths({6: {1024: 1.0, 2048: 1.0}, 5: {1024: 1.0, 2048: 1.0}})) == config(5)
    faulty = [trial(None, status="hang", c=config(9), max_kv_len=kv) for kv in (1024, 4096, 16384)]
    assert lookup.robust([*rows, *faulty]) == config(2)


@pytest.mark.parametrize(
    ("table", "order"),
    [
        # worst cases of 1.20 and 1.40 are alike, and the mean decides; 1.45 is not
        ({1: (12.0, 24.0, 36.0), 2: (14.0, 20.0, 30.0), 3: (14.5, 20.0, 30.0), 4: (10.0, 40.0, 60.0),
          5: (40.0, 20.0, 60.0), 6: (40.0, 40.0, 30.0)}, (2, 1, 3)),
        # means of 1.049 and 1.050 are the same, and the worst case decides; 1.063 and 1.075 are not
        ({1: (10.0, 11.55, 30.0), 2: (10.5, 10.5, 31.5), 3: (11.0, 10.0, 33.9), 4: (10.0, 10.0, 36.0)}, (2, 1, 4, 3)),
    ],
)  # fmt: skip
def test_the_mean_decides_and_the_worst_case_where_means_or_worst_cases_are_alike(table, order):
    times = {number: dict(zip((1024, 4096, 16384), us, strict=True)) for number, us in table.items()}
    ranked = lookup.by_worst_case(sorted(over_lengths(times), key=lambda t: str(t.problem)))
    assert ranked[: len(order)] == [config(number) for number in order]


def test_a_config_that_a_search_has_but_looked_at_everywhere_is_not_robust():
    """It may be the only one that each search has measured, shortly, and bad everywhere."""
    lengths = dict.fromkeys((1024, 4096, 16384), 1.0)
    shortly = [dataclasses.replace(row, effort=0) for row in over_lengths({1: dict.fromkeys(lengths, 5.0)})]
    winners = over_lengths({2: {1024: 1.0}, 3: {4096: 1.0, 16384: 1.0}})
    rows = sorted([*shortly, *(dataclasses.replace(row, effort=2) for row in winners)], key=lambda t: str(t.problem))
    assert lookup.robust(rows) == config(3)


def test_without_hints_the_worst_case_counts(db):
    ship(over_lengths(TABLE) + over_lengths({1: {1024: 1.0, 16384: 1.0}}, batch=64))
    assert look(max_kv_len=1024).config == config(1)
    found = look(max_kv_len=131072, hinted=False)
    assert (found.config, found.provenance) == (config(2), "measured")
    assert found.why.startswith("steady over kv 1024, 4096, 16384; shipped row of this problem: measured, 36.00")
    assert look(max_kv_len=4096, hinted=False).config == config(4)  # up to there
    assert look(max_kv_len=1024, hinted=False).config == config(1)  # one length is no case: as with a hint
    assert look(max_kv_len=131072, hinted=False, batch=10).provenance == "neighbour"
    assert look(max_kv_len=131072, hinted=False, batch=50).config == config(1)
    assert look(max_kv_len=131072, hinted=False, batch=65) is None
    assert look(lambda c: "no" if c == config(2) else None, max_kv_len=131072, hinted=False).config == config(3)
    assert look(max_kv_len=131072, hinted=False, toolchain="triton 10").provenance == "stale"


def test_configs_are_all_that_a_lookup_may_give(db):
    """Against lookups of many sizes: a process that may not compile must find what was compiled ahead."""
    rng = random.Random(7)
    rows = [
        trial(rng.uniform(5, 50), c=config(n), batch=rng.choice([1, 5, 32, 200]), num_heads=rng.choice([8, 16, 64]),
              max_kv_len=rng.choice([512, 4096, 32768]), page_size=rng.choice([16, 64]), revision=rng.choice([2, 3]),
              total_kv=rng.choice([None, None, 1024, 65536]))
        for n in range(60)
    ]  # fmt: skip
    ship(rows[:30])
    with Store(db) as s:
        s.add(rows[30:])

    def legal(config):
        return "odd" if config.int("num_kv_splits") % 7 == 3 else None

    for heads in (8, 16, 24, 64):
        given = {
            found.config
            for batch in (1, 2, 3, 5, 12, 13, 32, 80, 200) for kv in (512, 1024, 2048, 4096, 16384, 32768, 131072)
            for hinted, total in ((True, None), (True, 3000), (True, 100000), (False, None))
            if (found := look(legal, batch=batch, max_kv_len=kv, num_heads=heads, hinted=hinted, total_kv=total))
        }  # fmt: skip
        ahead = lookup.configs(problem(num_heads=heads), TARGET, legal, REVISIONS, NOW)
        assert given <= set(ahead)
        assert len(ahead) < 40
    assert lookup.configs(problem(num_heads=65), TARGET, legal, REVISIONS, NOW) == ()
