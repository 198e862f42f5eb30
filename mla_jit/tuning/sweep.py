"""A sweep: shapes to tune, each searched on one device, every trial stored as it is made. `mla-tune plan` and `run`.

Several devices share a queue of shapes; a shape stays on one. A sweep that was stopped, however, goes on where it was:
finished shapes are recognised by their playoff's trials, half-finished ones repeat no measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from mla_jit import models, ops, plan
from mla_jit.compile import triton
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.errors import CompileError, InvalidInput, NoVariant
from mla_jit.problem import MIXES, DecodeProblem, PrefillProblem, Tunable, bucket
from mla_jit.target import Target
from mla_jit.tuning import candidate, lookup, search, space
from mla_jit.tuning.builds import Builds
from mla_jit.tuning.rows import OK, PROBLEMS, Measurement, Trial, preferred
from mla_jit.tuning.store import Store
from mla_jit.tuning.worker import PREPARE_S

EFFORTS = ((3, 1.0), (5, 3.0), (9, 5.0))  # (rounds, milliseconds a window) by effort
LAST = len(EFFORTS) - 1
LENGTHS = ("even", "ragged", *MIXES)  # how the lengths of a batch are distributed; "ragged" is the first of MIXES
_SHARES = 5  # even shares of the time left that a shape may take
_PLAYOFFS = 0.15  # of the budget, at the end, for playoffs between lengths
_FEW = 4  # sequences, beyond which blocks of 64 rows fill the device however short they are
_GOOD = 1.05  # times the fastest: a case that is not looked to be improved
_STEADY = 3  # configs that are steady over a family's lengths (`lookup.by_worst_case`), timed at each
_AHEAD = 6  # shapes whose kernels are compiled before their turn
_SHORTEST = 128  # tokens of a ragged batch's shortest sequence
Event = Callable[[str, dict[str, Any]], None]


class Measurer(Protocol):
    """What a sweep needs of pool.Pool."""

    def measure(
        self, device: str, problem: Tunable, config: Config, *, rounds: int, window_ms: float, timeout_s: float,
        prepare_s: float = PREPARE_S,
    ) -> Measurement: ...  # fmt: skip

    def start(self, device: str) -> None: ...

    def versions(self, device: str) -> dict[str, str]: ...


def shapes(
    wanted: Iterable[tuple[models.Model, int]], target: Target, *, dtypes: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 4, 16, 64, 128), kv_lens: Sequence[int] = (1024, 4096, 16384, 65536),
    q_lens: Sequence[int] = (1,), page_size: int = 64, lengths: Sequence[str] = ("even",),
    layout: str = "joint", memory_bytes: int | None = None,
) -> list[DecodeProblem]:  # fmt: skip
    """The decodes of (model, tensor-parallel ranks) pairs, each once: models with the same heads and dims share them.

    lengths: "even", all as long as the bound; "log-uniform" from 128 tokens to it, also called "ragged"; "uniform", up
    to it; "one-long", one as long and the others of 128 tokens. The uneven ones are told by total_kv, rounded as a
    call's is, and by mix; one whose rounded total is that of even lengths is left out.
    Left out: lengths beyond a model's context, and caches larger than memory_bytes. Those that share kernels follow
    each other. layout: the cache's; of the dtypes those count that it can have. InvalidInput for an unknown
    distribution or layout.
    """
    if unknown := set(lengths) - set(LENGTHS):
        raise InvalidInput(f"lengths {', '.join(sorted(unknown))}: unknown; use {', '.join(LENGTHS)}")
    found: dict[DecodeProblem, None] = {}
    for model, tp in wanted:
        pairs = [models.dtypes_on(name, target) for name in (dtypes if dtypes is not None else model.dtypes)]
        for _, q, cache in models.laid_out(layout, pairs):
            for q_len, batch, kv_len, how in itertools.product(q_lens, batches, kv_lens, lengths):
                mix = how if how in MIXES else MIXES[0]
                total = None if how == "even" else _total(batch, kv_len, mix)
                if how != "even" and (total is None or total >= batch * bucket(kv_len)):
                    continue
                problem = DecodeProblem(
                    num_heads=model.local_heads(tp), kv_lora_rank=model.kv_lora_rank, rope_dim=model.rope_dim,
                    q_dtype=q, kv_dtype=cache, out_dtype="bf16" if DTYPES[q].bits == 8 else q,
                    page_size=page_size, layout=layout, batch=batch, q_len=q_len, max_kv_len=bucket(kv_len),
                    total_kv=total, hinted=True, mix=mix,
                )  # fmt: skip
                if kv_len <= model.max_kv_len and problem.data_bytes <= (memory_bytes or 1 << 62):
                    found[problem] = None
    return list(found)


def prompts(
    wanted: Iterable[tuple[models.Model, int]], target: Target, *, dtypes: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 4, 16), kv_lens: Sequence[int] = (1024, 4096, 16384), q_lens: Sequence[int] = (),
    causal: bool = True, memory_bytes: int | None = None,
) -> list[PrefillProblem]:  # fmt: skip
    """The prompts, un-absorbed, of (model, tensor-parallel ranks) pairs, each once; all of a batch are as long.

    q_lens: of chunks behind a prefix, the keys of both are kv_len; none: a whole prompt, as long as its keys. Sizes are
    rounded as a call's. causal: else every query sees every key, as those of a chunk do the prefix's.
    Left out: lengths beyond a model's context, causal chunks longer than their keys, and what is larger than
    memory_bytes.
    """
    found: dict[PrefillProblem, None] = {}
    for model, tp in wanted:
        for kind in models.prefill_problems(
            model, target, tp=tp, dtypes=dtypes, lse=(False,), causal=(causal,), scales="none"
        ):
            for batch, kv_len in itertools.product(batches, kv_lens):
                for q_len in q_lens or (kv_len,):
                    problem = dataclasses.replace(kind, **kind.sizes(batch, q_len, kv_len))
                    fits = problem.data_bytes <= (memory_bytes or 1 << 62)
                    if kv_len <= model.max_kv_len and fits and (q_len <= kv_len or not causal):
                        found[problem] = None
    return list(found)


SHAPES: dict[str, Callable[..., Sequence[Tunable]]] = {"decode": shapes, "prefill": prompts}  # by op


def _total(batch: int, kv_len: int, mix: str) -> int | None:
    """Tokens of a batch with this mix of lengths up to kv_len, rounded as a call's; None where none is shorter."""
    if batch == 1 or kv_len <= _SHORTEST:
        return None
    if mix == "uniform":
        return bucket(-(-batch * kv_len // 2))
    if mix == "one-long":
        return bucket(kv_len + (batch - 1) * _SHORTEST)
    return bucket(round(batch * (kv_len - _SHORTEST) / math.log(kv_len / _SHORTEST)))


@dataclass(frozen=True)
class Finished:
    """A shape of a sweep. `outcome` is None where it was finished before."""

    problem: Any  # a Tunable
    device: str
    outcome: search.Outcome | None
    seconds: float


def candidates(problem: Tunable, target: Target) -> list[Config]:
    """The legal configs of every variant that accepts the problem, the default of `plan` first; batch_invariant has no
    other. Those for any length (`Variant.any_length`) are not searched."""
    if getattr(problem, "batch_invariant", False):
        with contextlib.suppress(NoVariant):
            return [plan.analytic(problem, target).config]
    return space.candidates(problem, target, [v for v in ops.variants(problem.op) if not v.any_length])


def run(
    problems: Sequence[Tunable], target: Target, devices: Sequence[str], pool: Measurer, store: Store, *,
    budget_s: float, how: str = "auto", resume: bool = True, timeout_s: float = 60.0, command: str = "mla-tune run",
    cross: bool = True, builds: Builds | None = None, on_event: Event | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Finished]:  # fmt: skip
    """Tunes each problem on one of the devices; yields as they finish. The budget is shared by the shapes still to do.

    Then (`cross`), on the same device, the best configs of problems that differ in lengths alone are timed at each
    other's lengths, so that for a call without hints the best worst case is known; and where it is not yet good, it is
    looked for among the neighbours of the config that has it (`_Sweep.settle`). `builds` compiles ahead of the
    workers; one is made, and closed, if absent. KeyboardInterrupt (or `stop`) ends it after the running measurements;
    what was measured is stored.
    """
    sweep = _Sweep(
        target, pool, store, how, resume, timeout_s, command, on_event, stop or threading.Event(),
        time.monotonic() + budget_s, len(devices), problems, len(problems), builds or Builds(target),
    )  # fmt: skip
    todo: queue.SimpleQueue[Tunable] = queue.SimpleQueue()
    for problem in problems:
        todo.put(problem)
    done: queue.SimpleQueue[Finished | BaseException] = queue.SimpleQueue()
    tuned, crossed = threading.Barrier(len(devices)), threading.Barrier(len(devices))
    kinds = sweep.of_lengths() if cross else []
    sweep.reserve_s = _PLAYOFFS * budget_s if kinds else 0.0

    def serve(device: str) -> None:
        mine: list[Tunable] = []
        try:
            while not sweep.stop.is_set():
                try:
                    problem = todo.get_nowait()
                except queue.Empty:
                    break
                finished = sweep.tune(problem, device)
                mine.append(problem)
                done.put(finished)
            tuned.wait()
            for problem in (*mine, *sweep.earlier(mine, problems)) if cross else ():
                sweep.cross(problem, device)
            crossed.wait()
            for kin in kinds if device == devices[0] else ():  # shapes on their own devices, which are free now
                sweep.settle(kin)
        except threading.BrokenBarrierError:  # another device's thread has ended with an error
            pass
        except BaseException as error:  # handed to the caller's thread
            tuned.abort()
            crossed.abort()
            done.put(error)

    threads = [threading.Thread(target=serve, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) or not done.empty():
            try:
                item = done.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        sweep.stop.set()
        tuned.abort()
        crossed.abort()
        if builds is None:
            sweep.builds.close()
        for thread in threads:
            thread.join(timeout_s + 10)


@dataclass
class _Sweep:
    """What the shapes of a sweep share."""

    target: Target
    pool: Measurer
    store: Store
    how: str
    resume: bool
    timeout_s: float
    command: str
    on_event: Event | None
    stop: threading.Event
    deadline: float
    devices: int
    problems: Sequence[Tunable]
    left: int
    builds: Builds
    legal: dict[Tunable, list[Config]] = field(default_factory=dict)  # candidates of problems that are to come
    winners: dict[Tunable, Config] = field(default_factory=dict)
    defaults: dict[Tunable, Config] = field(default_factory=dict)
    default_us: dict[Tunable, float] = field(default_factory=dict)
    expected: set[Tunable] = field(default_factory=set)  # problems whose kernels are asked for ahead
    families: dict[Tunable, dict[Tunable, Config]] = field(default_factory=dict)
    steady: dict[Tunable, dict[int, list[Config]]] = field(default_factory=dict)
    homes: dict[Tunable, str] = field(default_factory=dict)  # the device that a problem is timed on
    reserve_s: float = 0.0  # before the deadline, that no search takes
    lock: threading.Lock = field(default_factory=threading.Lock)

    def share_s(self) -> float:
        """Seconds for a shape: some even shares, as the first of a kind wait for compilers and later ones do not."""
        with self.lock:
            left_s = max(0.0, self.deadline - self.reserve_s - time.monotonic())
            return min(left_s, _SHARES * left_s * self.devices / max(self.left, self.devices))

    def tune(self, problem: Tunable, device: str) -> Finished:
        """Searches the best config, unless that was finished before."""
        started = time.monotonic()
        self.homes[problem] = device
        same = self.trials(problem)
        known = {(trial.config, trial.effort): _measurement(trial) for trial in same} if self.resume else {}
        played = [(t.config, t.median_us, t.spread_us) for t in same if t.effort == LAST and t.median_us is not None]
        outcome = None
        if self.resume and played:
            self.winners[problem] = preferred(played)
        else:
            self.pool.start(device)
            found = self.candidates(problem)
            self.builds.start(problem, found[:1])
            if found:
                self.defaults[problem] = found[0]
            over = threading.Event()
            with ThreadPoolExecutor(1, "mla_jit-expect") as aside:
                expected = None
                if self.how == "auto":  # what it, and then later ones, may come to want, while this one is measured
                    self.builds.start(problem, search.first(problem, self.target, found))
                    expected = aside.submit(self.expect, problem, found, over)
                outcome = search.tune(
                    problem, self.target, found,
                    lambda config, effort: self.measure(problem, device, config, effort, self.reserve_s),
                    budget_s=self.share_s(), search=self.how, incumbents=self.incumbents(problem, same), done=known,
                    on_event=lambda name, data: self.keep(problem, device, name, data),
                    ready=lambda configs, seconds: self.builds.ready(problem, configs, seconds),
                )  # fmt: skip
                over.set()
                if expected is not None:
                    expected.result()
            if outcome.median_us is not None:
                self.winners[problem] = outcome.winner
        self.legal.pop(problem, None)
        with self.lock:
            self.left -= 1
        return Finished(problem, device, outcome, time.monotonic() - started)

    def candidates(self, problem: Tunable) -> list[Config]:
        if problem not in self.legal:
            self.legal[problem] = candidates(problem, self.target)
        return self.legal[problem]

    def expect(self, problem: Tunable, found: Sequence[Config], over: threading.Event) -> None:
        """Has kernels compiled before they are asked for: this problem's, then those of what follows in the sweep.

        A search would else wait for compilers where it is the first with its kernels. Ends early once `over`.
        """
        first = self.problems.index(problem) + 1
        later = self.problems[first : first + _AHEAD]
        for following in later[:1]:
            self.builds.start(following, search.first(following, self.target, self.candidates(following)), idle=1)
        self.builds.start(problem, search.both_kernels(problem, self.target, found), idle=1)
        for following in later:
            if following in self.expected:
                continue
            if over.is_set() or self.stop.is_set():
                return
            theirs = self.candidates(following)
            self.builds.start(following, search.first(following, self.target, theirs), idle=2)
            self.builds.start(following, search.both_kernels(following, self.target, theirs), idle=3)
            self.expected.add(following)

    def cross(self, problem: Tunable, device: str) -> None:
        """Times what is best at other lengths, and over all lengths, at this problem's, as in a playoff."""
        family = self.family(problem)
        found = dict.fromkeys(config for kin, config in family.items() if kin != problem)
        if found:  # and what a call without hints has without a database
            longest = max(family, key=lambda kin: (kin.max_kv_len, kin.total_kv is None))
            found |= dict.fromkeys(candidates(longest, self.target)[:1])
            found |= dict.fromkeys(_for_any_length(longest, self.target))
            found |= dict.fromkeys(self.steadiest(problem))
        self.play(problem, device, found)

    def play(self, problem: Tunable, device: str, configs: Iterable[Config]) -> None:
        """Times as in a playoff what is legal here of the configs, and was not timed so before, nor failed.

        Not where the search has not come to its own playoff: by one a shape is known as finished.
        """
        trials = self.trials(problem)
        if not any(t.effort == LAST for t in trials):
            return
        known = {t.config for t in trials if t.status != OK or t.effort == LAST}
        legal = _legal(problem, self.target)
        todo = [config for config in configs if config not in known and legal(config)]
        if not todo:
            return
        for config in self.builds.ready(problem, todo, self.deadline - time.monotonic()):
            if self.stop.is_set() or time.monotonic() > self.deadline:
                return
            try:
                measurement = self.measure(problem, device, config, LAST)
            except search.BudgetSpent:
                return
            self.keep(problem, device, "trial", {"config": config, "effort": LAST, "measurement": measurement})

    def of_lengths(self) -> list[list[Tunable]]:
        """The sweep's problems by what they are but for lengths, where there are several, of earlier sweeps too."""
        kinds: dict[Tunable, list[Tunable]] = {}
        for problem in self.problems:
            kinds.setdefault(_but_lengths(problem), []).append(problem)
        return [kin for kind, kin in kinds.items() if len({*kin, *self.stored(kind)}) > 1]

    def stored(self, kind: Tunable) -> dict[Tunable, Config]:
        """What is best for problems of this kind, by a playoff of today's templates in this sweep or an earlier one."""
        fields = {name: value for name, value in kind.fields().items() if name not in kind.LENGTHS}
        rows = self.current(self.store.best(**fields, **self.place))
        return {row.problem: row.config for row in rows if row.effort == LAST}

    def settle(self, kin: Sequence[Tunable]) -> None:
        """For each length of a family: whether a neighbour of the config that is steady over the lengths up to it
        (`lookup.robust`) is better, until none is or each length is _GOOD.

        A neighbour is timed where the config is worst, then where it is next to worst, and elsewhere only if it is
        faster there.
        """
        family = list(dict.fromkeys((*kin, *self.stored(_but_lengths(kin[0])))))
        family = [problem for problem in family if self.played(problem)]
        if len(family) < 2:
            return
        spaces = space.load(family[0].op)
        everything = [config for problem in family for config in self.candidates(problem)]
        longest = max(family, key=lambda p: (p.max_kv_len, p.total_kv is None))
        everything += _for_any_length(longest, self.target)
        home = self.homes[kin[0]]
        for capacity in sorted({p.max_kv_len for p in family}, reverse=True):
            within = [p for p in family if p.max_kv_len <= capacity]
            tried: set[tuple[Config, Tunable]] = set()
            while len(within) > 1 and not self.stop.is_set() and time.monotonic() < self.deadline:
                times = {problem: self.played(problem) for problem in within}
                rows = sorted((t for p in within for t in times[p].values()), key=lambda t: str(t.problem))
                config = lookup.robust(rows)
                if config is None or any(config not in times[p] for p in within):
                    break
                bad = [p for p in within if _ratio(times[p], config) > _GOOD and (config, p) not in tried]
                if not bad:
                    break
                worst = max(bad, key=lambda p: _ratio(times[p], config))
                tried.add((config, worst))
                near = space.neighbours(config, everything, spaces)
                self.play(worst, self.homes.get(worst, home), near)
                there = self.played(worst)
                better = [c for c in near if c in there and _us(there[c]) < _us(there[config])]
                for problem in within:
                    self.play(problem, self.homes.get(problem, home), better)

    def played(self, problem: Tunable) -> dict[Config, Trial]:
        """By config the fastest of its playoffs."""
        found: dict[Config, Trial] = {}
        for trial in self.trials(problem):
            if trial.status == OK and trial.effort == LAST:
                found[trial.config] = min(found.get(trial.config, trial), trial, key=_us)
        return found

    def family(self, problem: Tunable) -> dict[Tunable, Config]:
        """What is best for problems that differ from it in lengths alone, in this sweep or before; by a playoff."""
        kind = _but_lengths(problem)
        with self.lock:
            if kind not in self.families:
                found = self.stored(problem)
                mine = {p: config for p, config in self.winners.items() if _but_lengths(p) == kind}
                self.families[kind] = found | mine
            return self.families[kind]

    def steadiest(self, problem: Tunable) -> list[Config]:
        """The configs that are steady over the family's lengths up to this one, and up to each greater one, of those
        that were timed at each of them.

        So far, by whatever effort: where searches were exhaustive, one may be good everywhere that is nowhere the best.
        """
        kind = _but_lengths(problem)
        with self.lock:
            if kind not in self.steady:
                fields = {name: value for name, value in problem.fields().items() if name not in problem.LENGTHS}
                rows = sorted(
                    self.current(self.store.trials(**fields, status=OK, **self.place)), key=lambda t: str(t.problem)
                )
                self.steady[kind] = {
                    capacity: lookup.by_worst_case(t for t in rows if t.problem.max_kv_len <= capacity)[:_STEADY]
                    for capacity in {t.problem.max_kv_len for t in rows}
                }
            steady = self.steady[kind]
        found = (steady[capacity] for capacity in sorted(steady, reverse=True) if capacity >= problem.max_kv_len)
        return list(dict.fromkeys(itertools.chain.from_iterable(found)))

    def earlier(
        self, mine: Sequence[Tunable], problems: Sequence[Tunable]
    ) -> Iterator[Tunable]:  # fmt: skip
        """Problems of earlier sweeps, of the families of which the first in this one is among `mine`."""
        first: dict[Tunable, Tunable] = {}
        for problem in problems:
            first.setdefault(_but_lengths(problem), problem)
        for problem in first.values():
            if problem in mine:
                yield from (other for other in self.family(problem) if other not in problems)

    @property
    def place(self) -> dict[str, str]:
        return {"target": self.target.name, "device": self.target.device}

    def trials(self, problem: Tunable) -> list[Trial]:
        """The problem's, of today's templates and compiler."""
        return self.current(self.store.trials(problem=problem, **self.place))

    def current(self, trials: Iterable[Trial]) -> list[Trial]:
        revisions = {variant.name: variant.revision for op in PROBLEMS for variant in ops.variants(op)}
        return [t for t in trials if t.revision == revisions.get(t.variant) and t.toolchain == toolchain()]

    def incumbents(self, problem: Tunable, same: Sequence[Trial]) -> list[Config]:
        """The best known of this very problem; and of the nearest one in the sweep that differs in lengths or batch."""
        timed = [t for t in same if t.status == OK and t.median_us is not None]
        best = min(timed, key=lambda t: (-t.effort, t.median_us or 0.0, t.config.to_json()), default=None)
        found = [] if best is None else [best.config]
        kin = [p for p in list(self.winners) if p != problem and _kind(p) == _kind(problem)]
        legal = _legal(problem, self.target)
        nearest = sorted(kin, key=lambda p: (_apart(p, problem), str(p)))
        return found + [self.winners[p] for p in nearest if legal(self.winners[p])][:1]

    def measure(
        self, problem: Tunable, device: str, config: Config, effort: int, reserve_s: float = 0.0
    ) -> Measurement:  # fmt: skip
        if self.stop.is_set():
            raise KeyboardInterrupt
        if (fault := self.builds.fault(problem, config)) is not None:
            return fault
        rounds, window_ms = EFFORTS[effort]
        try:
            return self.pool.measure(
                device, problem, config, rounds=rounds, window_ms=window_ms, timeout_s=self.timeout_s,
                prepare_s=max(0.1, self.deadline - reserve_s - time.monotonic()),
            )  # fmt: skip
        except TimeoutError as error:  # of a large problem's inputs and reference, which the pool makes first
            raise search.BudgetSpent(str(error)) from None

    def keep(self, problem: Tunable, device: str, name: str, data: dict[str, Any]) -> None:
        if name == "trial":
            if data["config"] == self.defaults.get(problem) and data["measurement"].median_us is not None:
                self.default_us[problem] = data["measurement"].median_us
            self.store.add([self.trial(problem, device, data["config"], data["effort"], data["measurement"])])
        if name == "shortlist":
            self.builds.start(problem, data["configs"])
        if self.on_event is not None:
            self.on_event(name, {"problem": problem, "device": device, **data})

    def trial(
        self, problem: Tunable, device: str, config: Config, effort: int, found: Measurement
    ) -> Trial:  # fmt: skip
        rounds, window_ms = EFFORTS[effort]
        revision = next(v.revision for v in ops.variants(problem.op) if v.name == config.variant)
        versions = self.pool.versions(device)
        return Trial(
            problem=problem, config=config, target=self.target.name, device=self.target.device, revision=revision,
            status=found.status, median_us=found.median_us, spread_us=found.spread_us,
            default_us=self.default_us.get(problem), rel_l2=found.rel_l2,
            registers=found.registers, spill_bytes=found.spill_bytes, smem_bytes=found.smem_bytes,
            source_hash=found.source_hash, toolchain=toolchain(), driver=versions.get("driver", ""),
            torch=versions.get("torch", ""), effort=effort,
            policy=f"{candidate.POLICY.partition(':')[0]}, {rounds} rounds of {window_ms:g} ms", command=self.command,
            created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"), note=found.note,
        )  # fmt: skip


def _for_any_length(longest: Tunable, target: Target) -> list[Config]:
    """Configs that serve short and long sequences differently, made for the longest of a family of few sequences."""
    if longest.batch > _FEW:
        return []
    return space.candidates(longest, target, [v for v in ops.variants(longest.op) if v.any_length])


def _us(trial: Trial) -> float:
    return math.inf if trial.median_us is None else trial.median_us


def _ratio(times: Mapping[Config, Trial], config: Config) -> float:
    """How many times as long as the fastest it takes."""
    return _us(times[config]) / min(map(_us, times.values()))


def _but_lengths(problem: Tunable) -> Tunable:
    return dataclasses.replace(problem, **problem.LENGTHS)


def _kind(problem: Tunable) -> Tunable:
    return dataclasses.replace(problem, **problem.KIN)


def _apart(a: Tunable, b: Tunable) -> float:
    """How far problems are from each other in batch, query tokens and keys, in powers of two."""
    sizes = ([math.log2(max(1, n)) for n in (p.batch, p.q_len, space.length(p))] for p in (a, b))
    return math.dist(*sizes)


def _legal(problem: Tunable, target: Target) -> Callable[[Config], bool]:
    _, legal = plan._rows(problem, target)
    return lambda config: legal(config) is None


def toolchain() -> str:
    """As trials record it; "" without Triton."""
    try:
        return triton.version()
    except CompileError:
        return ""


def _measurement(trial: Trial) -> Measurement:
    names = (f.name for f in dataclasses.fields(Measurement))
    return Measurement(**{name: getattr(trial, name) for name in names})
