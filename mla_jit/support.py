"""The support matrix: op × dtypes × target × backend, and what has been shown of each cell.

Whether a cell is refused comes from the variants' own predicate. What was shown comes from tuning_db/evidence.jsonl,
whose rows `prove` makes by really compiling or running a cell's problems; a row counts for the variant's present
revision only. The command is quick because it reads; a test compiles every cell and holds the file to that.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mla_jit import ahead, ops, resources, settings, target
from mla_jit.compile import triton as toolchain
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.errors import NoVariant
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem, PrefillProblem, Problem
from mla_jit.target import Target

STATES = ("refused", "unproven", "compiled", "executed", "measured")
LABELS = {"refused": "–", "unproven": "?", "compiled": "compiled", "executed": "executed", "measured": "**measured**"}
DTYPE_PAIRS = (
    ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"),
    ("bf16", "fp8_e4m3"), ("fp16", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3"),
    ("bf16", "fp8_e4m3fnuz"), ("fp16", "fp8_e4m3fnuz"), ("fp8_e4m3fnuz", "fp8_e4m3fnuz"),
)  # fmt: skip
BACKENDS = ("triton", "asm", "cpu")
HEADS = (16, 128)  # memory-bound and compute-bound: a block of rows for each
EVIDENCE = ("tuning_db", "evidence.jsonl")


@dataclass(frozen=True)
class Evidence:
    """A row of tuning_db/evidence.jsonl: `what` was shown of variants (name, revision) with these dtypes there."""

    op: str
    q_dtype: str
    kv_dtype: str
    target: str
    backend: str
    variants: tuple[tuple[str, int], ...]
    what: str  # "compiled" | "executed" | "measured"
    date: str
    device: str
    toolchain: str
    command: str

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        data = json.loads(text)
        return cls(**(data | {"variants": tuple((name, revision) for name, revision in data["variants"])}))

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.q_dtype, self.kv_dtype, self.target, self.backend


@dataclass(frozen=True)
class Cell:
    """One cell. `reason` is set for a refused one, `evidence` for one of which something was shown."""

    op: str
    q_dtype: str
    kv_dtype: str
    target: str
    backend: str
    state: str
    reason: str = ""
    evidence: Evidence | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.q_dtype, self.kv_dtype, self.target, self.backend


def problems(op: str, q_dtype: str, kv_dtype: str) -> tuple[Any, ...]:
    """What stands for a cell: few and many heads. Decode: whole pages and single tokens, one query token and two.

    Prefill: DeepSeek's heads, and smaller ones that share keys, not causal.
    """
    out = "bf16" if DTYPES[q_dtype].bits == 8 else q_dtype
    if op == "prefill":
        return _prompts(q_dtype, kv_dtype, out)
    assert op == "decode", op
    base: dict[str, Any] = {
        "q_dtype": q_dtype,
        "kv_dtype": kv_dtype,
        "out_dtype": out,
        "lse": True,
        "batch": 2,
        "max_kv_len": 512,
    }
    few, many = HEADS
    return (
        DecodeProblem(num_heads=few, page_size=64, **base),
        DecodeProblem(num_heads=many, page_size=64, **base | {"max_kv_len": 8192}),  # else few heads' kernels serve it
        DecodeProblem(num_heads=few, page_size=1, paging="csr", has_lens=False, q_len=2, **base),
    )


def _prompts(q_dtype: str, kv_dtype: str, out: str) -> tuple[PrefillProblem, ...]:
    base: dict[str, Any] = {
        "q_dtype": q_dtype, "kv_dtype": kv_dtype, "out_dtype": out, "lse": True, "batch": 2, "q_len": 96,
        "total_q": 160, "max_kv_len": 256, "total_kv": 512,
    }  # fmt: skip
    few, many = HEADS
    return (
        PrefillProblem(num_heads=few, num_kv_heads=few, **base),
        PrefillProblem(num_heads=many, num_kv_heads=many, **base),
        PrefillProblem(num_heads=few, num_kv_heads=few // 4, qk_dim=96, v_dim=64, causal=False, **base),
    )


@functools.cache
def evidence() -> dict[tuple[str, ...], Evidence]:
    """The rows that are shipped, by cell."""
    lines = resources.path(*EVIDENCE).read_text(encoding="utf-8").splitlines()
    rows = [Evidence.from_json(line) for line in lines if line.strip()]
    return {row.key: row for row in rows}


def matrix() -> list[Cell]:
    """Every cell, in the order of the tables above. Compiles and runs nothing."""
    return [
        _cell(op, q, kv, backend, there)
        for op in ops.OPS
        for backend in BACKENDS
        if any(variant.backend == backend for variant in ops.variants(op))
        for q, kv in DTYPE_PAIRS
        for there in target.targets().values()
    ]


def _cell(op: str, q: str, kv: str, backend: str, there: Target) -> Cell:
    try:
        variants = _variants(_choices(op, q, kv, backend, there))
    except NoVariant as error:
        return Cell(op, q, kv, there.name, backend, "refused", str(error))
    row = evidence().get((op, q, kv, there.name, backend))
    if row is None or row.variants != variants:
        return Cell(op, q, kv, there.name, backend, "unproven")
    return Cell(op, q, kv, there.name, backend, row.what, "", row)


def _choices(op: str, q: str, kv: str, backend: str, there: Target) -> list[tuple[Problem, Variant, Config]]:
    """For each of the cell's problems the backend's variant that a call would take. NoVariant, with the reason."""
    found = []
    for problem in problems(op, q, kv):
        best: tuple[float, Variant, Config] | None = None
        reason = f"no variant of the backend {backend}"
        for variant in ops.variants(op):
            if variant.backend == backend:
                config = variant.default(problem, there)
                if (refusal := variant.rejects(problem, there, config)) is not None:
                    reason = refusal
                elif best is None or variant.cost(problem, there, config).time_us < best[0]:
                    best = (variant.cost(problem, there, config).time_us, variant, config)
        if best is None:
            raise NoVariant(reason, {})
        found.append((problem, *best[1:]))
    return found


def _variants(choices: Sequence[tuple[Problem, Variant, Config]]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted({(variant.name, variant.revision) for _, variant, _ in choices}))


def prove(cells: Iterable[Cell], *, workers: int | None = None) -> tuple[list[Evidence], dict[Cell, str]]:
    """Shows what can be shown here: compiles each cell that is not refused, and runs those of this machine's target.

    (rows, failures). A cell whose kernels compile but are wrong here is a failure.
    """
    here, rows, failures = target.here(), [], {}
    for cell in cells:
        if cell.state == "refused":
            continue
        there = here if cell.target == here.name else target.by_name(cell.target)
        choices = _choices(cell.op, cell.q_dtype, cell.kv_dtype, cell.backend, there)
        jobs = _jobs(choices, there)
        faults = [built.error for built in ahead.build_all(jobs, workers=workers) if not built.ok]
        executed = cell.target == here.name and not faults
        if executed:
            faults = [fault for problem, *_ in choices if (fault := _execute(problem, there, cell.backend)) is not None]
        if faults:
            failures[cell] = "; ".join(faults)
            continue
        rows.append(
            Evidence(
                op=cell.op, q_dtype=cell.q_dtype, kv_dtype=cell.kv_dtype, target=cell.target, backend=cell.backend,
                variants=_variants(choices), what="executed" if executed else "compiled",
                date=dt.datetime.now(dt.timezone.utc).date().isoformat(), device=there.device if executed else "none",
                toolchain=toolchain.version() if jobs else "torch", command="mla-tune support --prove",
            )
        )  # fmt: skip
    return rows, failures


def _jobs(choices: Sequence[tuple[Problem, Variant, Config]], there: Target) -> list[ahead.Job]:
    """The kernels of the choices, each once."""
    jobs: dict[str, ahead.Job] = {}
    for problem, variant, config in choices:
        for source in variant.sources(problem, there, config):
            jobs.setdefault(source.key, ahead.Job(there.name, source, problem))
    return list(jobs.values())


def _execute(problem: Any, there: Target, backend: str) -> str | None:
    """What is wrong with the result of a random call of the problem on this machine, or None."""
    import mla_jit
    from mla_jit import trial

    device = "cpu" if there.runtime == "cpu" else "cuda"
    try:
        with settings.scope(backends=(backend,)):  # another backend's variant may be the faster one
            mla_jit.reload()
            if isinstance(problem, PrefillProblem):
                prompt = trial.make_prompt(problem, device)
                out, lse = mla_jit.prefill(prompt.q, prompt.k, prompt.v, **prompt.keywords)
                judge = functools.partial(trial.judge_prompt, prompt)
            else:
                call = trial.make_call(problem, device)
                out, lse = mla_jit.decode(call.q, call.kv_cache, **call.keywords)
                judge = functools.partial(trial.judge, call)
            dispatch = mla_jit.last_dispatch()
    finally:
        mla_jit.reload()
    if dispatch is None or dispatch.backend != backend:
        return (
            f"{problem} was served by {dispatch.variant if dispatch else None}, which is not of the backend {backend}"
        )
    judged = judge(out, lse)
    return None if judged.ok else f"{problem}: relative L2 {judged.rel_l2:.2e}, LSE {judged.lse_error:.2e}"


def merged(old: Iterable[Evidence], new: Iterable[Evidence]) -> list[Evidence]:
    """Rows sorted by cell; a new one replaces an old one of other revisions, or that shows no more than it."""
    rows = {row.key: row for row in old}
    for row in new:
        before = rows.get(row.key)
        stale = before is None or before.variants != row.variants
        if stale or STATES.index(before.what) <= STATES.index(row.what):  # type: ignore[union-attr]
            rows[row.key] = row
    return [rows[key] for key in sorted(rows)]


def write_evidence(rows: Iterable[Evidence]) -> None:
    """Replaces the shipped file (a checkout's)."""
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    resources.path(*EVIDENCE).write_text(text, encoding="utf-8")
    evidence.cache_clear()


def as_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells as plain JSON data."""
    return [asdict(cell) for cell in cells]


def markdown(cells: Sequence[Cell]) -> str:
    """A table an op and backend: a row a dtype pair, a column a target; below it why cells are refused."""
    lines: list[str] = []
    for op, backend in dict.fromkeys((cell.op, cell.backend) for cell in cells):
        table = [cell for cell in cells if (cell.op, cell.backend) == (op, backend)]
        served = {cell.target for cell in table if cell.state != "refused"}
        columns = [name for name in dict.fromkeys(cell.target for cell in table) if name in served]
        notes: dict[str, int] = {}
        lines += [
            f"| {op}, {backend}: q × {'cache' if op == 'decode' else 'k, v'} | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
        ]
        for q, kv in dict.fromkeys((cell.q_dtype, cell.kv_dtype) for cell in table):
            texts = []
            for cell in table:
                if (cell.q_dtype, cell.kv_dtype) == (q, kv) and cell.target in served:
                    note = notes.setdefault(_general(cell), len(notes) + 1) if cell.state == "refused" else 0
                    texts.append(LABELS[cell.state] + (f" ({note})" if note else ""))
            lines.append(f"| {q} × {kv} | " + " | ".join(texts) + " |")
        lines += ["", *(f"({number}) {reason}." for reason, number in notes.items())]
        elsewhere = {_general(cell): [] for cell in table if cell.target not in served}  # type: dict[str, list[str]]
        for cell in table:
            if cell.target not in served and cell.target not in elsewhere[_general(cell)]:
                elsewhere[_general(cell)].append(cell.target)
        lines += [f"Refused on {', '.join(names)}: {reason}." for reason, names in elsewhere.items()]
        lines += [""]
    return "\n".join(lines)


def _general(cell: Cell) -> str:
    """A refusal's reason without the target's name, so that one note serves a row."""
    return cell.reason.replace(cell.target, "this target")
