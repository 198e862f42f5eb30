"""Mistakes put into a copy of the kernels, and the proof that the interpreted cases see each one.

    python tests/mutations.py [NAME …]

Each mutation replaces one piece of text in a temporary copy of the package and runs tests/interpreted_main.py on the
cases whose ids contain `cases`, until one fails. A mutation that no case sees is a survivor; the exit status is their
number. There is no counter in these kernels to leave stale: what a split leaves behind is its slot of the workspace,
and "a stale slot read" reads one that was not written.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNEL = "mla_jit/ops/decode/triton_splitk.py"
PIECES = "mla_jit/ops/decode/triton_pieces.py"
COMBINE = "mla_jit/ops/decode/triton_combine.py"
SCALED = "mla_jit/ops/decode/triton_scaled.py"
INPUTS = "mla_jit/ops/decode/inputs.py"


@dataclass(frozen=True)
class Mutation:
    """`old` occurs once in `path`; `cases` is a part of the ids of those that are to see the change."""

    name: str
    old: str
    new: str
    cases: str
    path: str = KERNEL


MUTATIONS = (
    # tokens
    Mutation(
        "the last token skipped",
        "return tl.maximum(length, 0)\n",
        "return tl.maximum(length - 1, 0)\n",
        "kv100x37",
        PIECES,
    ),
    Mutation("a short last tile skipped", "if full_tile < last_tile:", "if full_tile + 1 < last_tile:", "kv100x37"),
    Mutation(
        "a last tile of one token skipped",
        "tiles = tl.cdiv(kv_len, BLOCK_N)",
        "tiles = tl.cdiv(kv_len - 1, BLOCK_N)",
        "11of0to65",
    ),
    Mutation(
        "the last page's length ignored", "(pages - 1) * PAGE + last", "pages * PAGE", "kv100x37-fp16-csr", PIECES
    ),
    Mutation("rope left out", "s = tl.dot(q_pe, tl.trans(k_pe), s)", "s = s", "kv100x37"),
    # pages, heads, ranks
    Mutation(
        "first and last page swapped",
        "pages_ptr + offs_n // PAGE, mask=offs_n",
        "pages_ptr + (kv_len - 1) // PAGE - offs_n // PAGE, mask=offs_n",
        "kv100x37",
    ),
    Mutation(
        "pages of another sequence",
        "b.to(tl.int64) * table_stride",
        "tl.maximum(b - 1, 0).to(tl.int64) * table_stride",
        "kv100x37",
    ),
    Mutation("another KV head", "kv_ptr += kvh.to(tl.int64)", "kv_ptr += 0 * kvh.to(tl.int64)", "h8over2"),
    Mutation(
        "a rank's last token skipped",
        "(limit - cp_rank + cp_world - 1)",
        "(limit - cp_rank + cp_world - 2)",
        "cp",
        PIECES,
    ),
    # splits
    Mutation(
        "the last split dropped",
        "used = tl.cdiv(tiles, _even",
        "used = tl.cdiv(tiles, 1 + _even",
        "numkvsplits7",
        COMBINE,
    ),
    Mutation(
        "a split's values dropped",
        "part_ok = ok[:, :, None]",
        "part_ok = (offs_s < used - 1)[:, None, None] & ok[:, :, None]",
        "numkvsplits7",
        COMBINE,
    ),
    Mutation(
        "a stale slot read",
        "ok = (offs_s < used)[:, None]",
        "ok = (offs_s < used + 1)[:, None]",
        "numkvsplits7",
        COMBINE,
    ),
    Mutation(
        "uneven lengths: the last piece dropped",
        "tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, pieces), 1))",
        "pieces - 1",
        "11of0to65",
        COMBINE,
    ),
    Mutation(
        "uneven lengths: another's pieces",
        "first = tl.sum(tl.where(offs_b < b,",
        "first = tl.sum(tl.where(offs_b < b - 1,",
        "11of0to65",
        COMBINE,
    ),
    # causal boundary
    Mutation(
        "causal: one token too few",
        "row_end = _visible(length - q_len + 1 + tok,",
        "row_end = _visible(length - q_len + tok,",
        "-q4-",
    ),
    Mutation(
        "causal: one token too many",
        "row_end = _visible(length - q_len + 1 + tok,",
        "row_end = _visible(length - q_len + 2 + tok,",
        "-q4-",
    ),
    Mutation(
        "causal: a tile on the diagonal unmasked",
        "clear = _visible(length - q_len + 1 +",
        "clear = _visible(length - q_len + 2 +",
        "-q4-",
    ),
    Mutation(
        "causal: a ragged batch as if it were even",
        "row_end = _visible(length - q_len + 1 + tok,",
        "row_end = _visible(length - max_q_len + 1 + tok,",
        "-qr",
    ),
    # LSE, sinks, scales
    Mutation("LSE in base 2, one piece", "lse * lse_mul, mask=row_ok", "lse, mask=row_ok", "numkvsplits1"),
    Mutation(
        "LSE in base 2, combined",
        "(shift + tl.log2(total)) * lse_mul",
        "shift + tl.log2(total)",
        "numkvsplits7",
        COMBINE,
    ),
    Mutation("LSE base ignored", '1.0 if lse_base == "2" else LN2', "LN2", "lsebase2", INPUTS),
    Mutation(
        "the sink counted in every split",
        "        if whole:\n            denominator",
        "        if True:\n            denominator",
        "sinks",
    ),
    Mutation("the sink of another head", "tl.load(sinks_ptr + head,", "tl.load(sinks_ptr + head // 2,", "sinks"),
    Mutation(
        "the sink in the LSE",
        "(shift + tl.log2(total)) * lse_mul",
        "(shift + tl.log2(denominator)) * lse_mul",
        "sinks",
        COMBINE,
    ),
    Mutation("V without its scale", "v_scale *= kv_scale", "v_scale *= 1.0", "kvscaletensor"),
    # scales of 128 columns
    Mutation("the scale of the first group for all", "tl.load(p_scale + g)", "tl.load(p_scale)", "scaled", SCALED),
    Mutation(
        "the scale of the first token for all",
        "p_scale = scales_ptr + page * scales_stride_page + row * scales_stride_tok",
        "p_scale = scales_ptr + page * scales_stride_page + 0 * row * scales_stride_tok",
        "c128r16-p16-q1-kv100x37-bf16xfp8_e4m3-outdtypefp32-scaled",
        SCALED,
    ),
    Mutation("K without its scales", "DECODE, COMPUTE))) * scales[g][None, :]", "DECODE, COMPUTE)))", "scaled"),
    Mutation("V without its scales", "(p * scales[g][None, :]).to(WEIGHTS)", "p.to(WEIGHTS)", "scaled"),
    Mutation(
        "scales of unused slots read",
        "tl.load(p_scale + g, mask=filled, other=0.0)",
        "tl.load(p_scale + g)",
        "h4over2-c256r16-p32",
        SCALED,
    ),
    Mutation(
        "scales of another KV head",
        "scales_ptr += kvh.to(tl.int64)",
        "scales_ptr += 0 * kvh.to(tl.int64)",
        "h4over2-c256r16-p32",
    ),
    Mutation(
        "a group of the result twice", "(acc[g] * scale[:, None])", "(acc[0] * scale[:, None])", "c256r32-p7", SCALED
    ),
    Mutation("the cap after the scale left out", "if CAP:", "if CAP and R < 0:", "cap15"),
)


@dataclass(frozen=True)
class Outcome:
    """Whether a mutation was seen, by what, and how long that took."""

    name: str
    killed: bool
    detail: str
    seconds: float

    def __str__(self) -> str:
        return f"{'killed' if self.killed else 'SURVIVED':9}{self.name:42}{self.seconds:5.1f} s  {self.detail}"


def mutate(mutation: Mutation, copy: Path) -> None:
    """A copy of the package with the mistake in it. ValueError if the text is not there exactly once."""
    for name in ("mla_jit", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    target = copy / mutation.path
    text = target.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.path} has {text.count(mutation.old)} times {mutation.old!r}")
    target.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def _child(copy: Path, cases: str) -> None:
    """Runs the cases on the copy, in a fork of a process that has torch and Triton but not mla_jit."""
    with (copy / "stdout").open("w") as out, (copy / "stderr").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    sys.path[:0] = [str(copy), str(ROOT / "tests")]
    sys.argv = ["interpreted_main.py", "--stop", f"--only={cases}"]
    import interpreted_main

    sys.exit(interpreted_main.main())


def judge(mutation: Mutation, copy: Path, exitcode: int | None, seconds: float) -> Outcome:
    """Only a judgement of `cases.check` counts: a process that died says nothing about what the cases see."""
    lines = [json.loads(line) for line in (copy / "stdout").read_text().splitlines()]
    errors = [line["error"] for line in lines if "error" in line]
    if not lines or lines[0].get("package") != str(copy / "mla_jit"):
        detail = f"the copy did not run: {(copy / 'stderr').read_text().strip()[-300:]}"
    elif errors:
        detail = errors[0].splitlines()[0][:150]
    else:
        detail = f"{len(lines) - 1} cases passed (exit status {exitcode})"
    return Outcome(mutation.name, bool(errors) and errors[0].startswith("AssertionError: h"), detail, seconds)


def outcomes(names: Sequence[str] = (), workers: int = 2) -> Iterator[Outcome]:
    """The outcomes of the mutations of these names (all, if none), as they end. Imports torch and Triton first."""
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.simplefilter("ignore")
    import torch
    import triton  # noqa: F401  before the fork

    torch.set_num_threads(1)
    assert "mla_jit" not in sys.modules, "the children must import their copy"
    context = multiprocessing.get_context("fork")
    waiting = [m for m in MUTATIONS if not names or m.name in names]
    running: dict[int, tuple[Mutation, Path, multiprocessing.process.BaseProcess, float]] = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        while waiting or running:
            while waiting and len(running) < workers:
                mutation = waiting.pop(0)
                copy = Path(directory, str(len(waiting)))
                mutate(mutation, copy)
                process = context.Process(target=_child, args=(copy, mutation.cases))
                process.start()
                running[process.sentinel] = (mutation, copy, process, time.perf_counter())
            for sentinel in multiprocessing.connection.wait(list(running), timeout=300):
                mutation, copy, process, started = running.pop(sentinel)  # type: ignore[index]
                process.join()
                yield judge(mutation, copy, process.exitcode, time.perf_counter() - started)


def main() -> int:
    survivors = 0
    for outcome in outcomes(sys.argv[1:]):
        sys.stdout.write(f"{outcome}\n")
        sys.stdout.flush()
        survivors += not outcome.killed
    return survivors


if __name__ == "__main__":
    sys.exit(main())
