"""The verb `mla-tune bench`: times our decode on grids of shapes, and prints rows as they come, then their summary.

Exit codes: 0 done, 1 an aim was missed or something cannot be timed here, 2 wrong usage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from mla_jit.cli_options import DONE, SHORT, print_json, repeated, verb
from mla_jit.errors import InvalidInput, MlaJitError

if TYPE_CHECKING:
    from mla_jit.tuning.bench import Shape
    from mla_jit.tuning.grids import Figure

# The columns of each grid: a row's attribute, the title, the format.
_TIMES = (("ours_us", "ours us", ">9.1f"), ("low_us", "low", ">8.1f"), ("high_us", "high", ">8.1f"))
_BESIDE = (
    ("best_us", "best peer", ">9.1f"), ("score", "score", ">6.2f"), ("roof_us", "roof", ">7.1f"),
    ("error", "error", ">8.1e"), ("timed_us", "timed now", ""),
)  # fmt: skip
_SHAPE = ("shape", "shape", "<28")
_GRIDS = {
    "peers": (_SHAPE, *_TIMES, *_BESIDE),
    "q2": (_SHAPE, *_TIMES, *_BESIDE),
    "capture": (
        _SHAPE, ("capacity_us", "capacity us", ">11.1f"), ("hint_us", "exact hint us", ">13.1f"),
        ("ratio", "ratio", ">6.3f"), ("low", "low", ">6.3f"), ("high", "high", ">6.3f"), ("error", "error", ">8.1e"),
    ),
    "ragged": (
        ("shape", "shape", "<34"), ("scheduler", "scheduler", "<10"), *_TIMES, ("aim_us", "aim", ">7.1f"),
        ("error", "error", ">8.1e"),
    ),
    "prefill": (
        ("shape", "shape", "<30"), ("ours_us", "ours us", ">9.0f"), ("low_us", "low", ">8.0f"),
        ("high_us", "high", ">8.0f"), ("tflops", "TFLOP/s", ">8.0f"), ("cudnn_us", "cuDNN us", ">9.0f"),
        ("cudnn_tflops", "TFLOP/s", ">8.0f"), ("score", "score", ">6.2f"), ("tiles_us", "tiles us", ">9.0f"),
        ("persistent_us", "persistent", ">10.0f"), ("fp8_us", "fp8 us", ">8.0f"), ("error", "error", ">8.1e"),
        ("provenance", "choice", "<9"), ("variant", "variant", ""),
    ),
    "databases": (
        _SHAPE, ("tuned_us", "tuned us", ">9.1f"), ("untuned_us", "untuned us", ">10.1f"),
        ("best_us", "best peer", ">9.1f"), ("tuned_score", "score", ">6.2f"),
        ("untuned_score", "untuned score", ">13.2f"), ("error", "error", ">8.1e"), ("provenance", "choice", "<9"),
        ("timed_us", "timed now", ""),
    ),
    "quality": (
        ("shape", "shape", "<30"), ("legal", "legal", ">6"), ("spread", "spread", ">6.2f"),
        ("explored", "explored", ">8"), ("exhaustive_us", "exhaustive us", ">13.2f"), ("auto_us", "auto us", ">9.2f"),
        ("reached", "reached", ">7.3f"), ("exhaustive_s", "exhaustive s", ">12.1f"), ("auto_s", "auto s", ">7.1f"),
    ),
    "neighbours": (
        _SHAPE, ("tuned_us", "tuned us", ">9.2f"), ("neighbour_us", "neighbour", ">9.2f"),
        ("analytic_us", "analytic", ">9.2f"), ("aiter_us", "aiter", ">9.2f"), ("vllm_us", "vllm", ">9.2f"),
        ("reached", "reached", ">7.3f"), ("whence", "neighbour from", ""),
    ),
    "host": (
        ("case", "one sequence", "<34"), ("kernels", "kernels", ">7"), ("median_us", "median us", ">9.2f"),
        ("low_us", "low", ">7.2f"), ("high_us", "high", ">7.2f"), ("min_us", "min", ">7.2f"),
    ),
    "first-call": (
        ("cache", "cache", "<6"), ("call", "call", "<5"), ("heads", "heads", ">5"), ("median_ms", "median ms", ">9.1f"),
        ("min_ms", "min", ">8.1f"), ("max_ms", "max", ">8.1f"), ("compile_s", "compile s", ">9.2f"),
        ("variant", "variant", "<20"), ("origins", "kernels from", ""),
    ),
}  # fmt: skip
_OF_SHAPES = (_SHAPE, *_TIMES, ("spread_us", "spread", ">7.2f"), *_BESIDE)
_WITH_PEERS = ("peers", "q2", "databases", "shapes")
_PROOFS = ("quality", "neighbours")  # they measure as often as they need
_RUNS = 3
_DTYPES = ("bf16", "fp16", "fp8")


def _sizes(text: str) -> tuple[int, int, int, int]:
    """(heads, batch, kv_len, q_len)."""
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text) is None:
        raise ValueError(f"{text!r} is no shape; write HEADSxBATCHxKV or HEADSxBATCHxKVxQLEN, as 128x64x4096")
    heads, batch, kv_len, q_len, *_ = (*map(int, text.split("x")), 1)
    return heads, batch, kv_len, q_len


@click.command("bench")
@click.option("--grid", type=click.Choice(list(_GRIDS)), show_default="peers", help="What to time.")
@repeated("--shape", _sizes, "Time this shape instead of a grid: HEADSxBATCHxKV, HEADSxBATCHxKVxQLEN.")
@click.option("--dtype", type=click.Choice(_DTYPES), show_default="bf16", help="With --shape: fp8 is the cache's.")
@click.option("--page-size", type=click.IntRange(1), show_default="64", help="With --shape: tokens a page.")
@repeated("--against", str, "A peer to time in the same run, if its package imports: flash_mla, flashinfer, sdpa.")
@click.option(
    "--runs", type=click.IntRange(1), show_default=str(_RUNS),
    help="Runs on fresh inputs (first-call: in fresh processes); the median counts.",
)  # fmt: skip
@click.option("--capacity-hint", is_flag=True, help="Also pass max_kv_len, the exact length, as a hint.")
@click.option("--apart", is_flag=True, help="With a small kernel of torch's between calls, its time subtracted.")
@verb
def bench(
    grid: str | None, shape: tuple[tuple[int, int, int, int], ...], dtype: str | None, page_size: int | None,
    against: tuple[str, ...], runs: int | None, capacity_hint: bool, apart: bool, as_json: bool,
) -> int:  # fmt: skip
    """Time `decode` on the GPU on the shapes where peers were measured, or what a call costs beside its kernels.

    \b
    peers       one query token, on every shape where peers were measured
    q2          two query tokens
    capture     graphs captured at the table's capacity, against the exact max_kv_len
    ragged      uneven lengths by both schedulers, the list made in each call; the kernel that makes it; empty sequences
    prefill     prompts, causal and not, beside cuDNN through torch's attention, with both schedulers and in fp8;
                uneven ones beside equal ones
    databases   the shapes of peers with the tuning databases and without any; then shapes that they do not hold
    quality     the tuner's auto search against the exhaustive one; takes long
    neighbours  shapes that the databases do not hold: the nearest row's config, the default, others' rules for splits,
                each against the shape's own tuned config
    host        host time of a warm eager call, and with --against of peers'; without a GPU on the null runtime
    first-call  a process's first calls, with an empty cache and with a filled one

    peers, q2, capture, ragged, databases and --shape give microseconds a call in CUDA graphs, with the KV rotated past
    the L2, every result checked first. score = best peer ÷ ours, of the recorded figures and of those timed in this run
    by --against, in alternation; a peer that cannot serve a shape has "-". Calls come one right after the other, so a
    kernel that may start before the last call's have ended does; --apart is for what a call takes after other work.
    Exit code 1 without a GPU, but for host, and where an aim is missed, which is printed beside its figure.
    """
    import torch

    what = _what(grid, shape, dtype, page_size)
    _check(what, against, runs, capacity_hint, apart)
    device = "no GPU, null runtime"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif what != "host":
        which = "a shape" if what == "shapes" else f"the grid {what}"
        raise MlaJitError(
            f"{which} needs a GPU, and torch sees none; `bench --grid host` and `mla-tune quickstart` run here"
        )
    runs = None if what in _PROOFS else runs or _RUNS
    shapes = _shapes(shape, dtype or _DTYPES[0], page_size or 64)
    columns = _OF_SHAPES if what == "shapes" else _GRIDS[what]
    if not as_json:
        how = f"{dtype or _DTYPES[0]}, page {page_size or 64}" if shape else f"{what} grid"
        how += ", calls apart" if apart else ""
        click.echo(", ".join([device, f"torch {torch.__version__}", *([f"{runs} runs"] if runs else []), how]))
        click.echo(_line((title, spec.partition(".")[0]) for _, title, spec in columns))
    rows, seconds = [], dict[str, float]()
    for row in _rows(what, device, shapes, against, runs or _RUNS, capacity_hint, apart, seconds):
        rows.append(row)
        if not as_json:
            click.echo(_line((getattr(row, name), spec) for name, _, spec in columns))
    figures = _figures(what, rows, seconds)
    ok = all(figure.met for figure in figures)
    if as_json:
        from mla_jit.tuning import grids

        print_json({
            "ok": ok, "device": device, "torch": torch.__version__, "grid": what, "runs": runs,
            **{figure.name: figure.value for figure in figures},
            "aims": {figure.name: figure.aim for figure in figures if figure.aim is not None},
            "missed": [figure.name for figure in figures if not figure.met],
            "rows": [grids.as_json(row) for row in rows],
        })  # fmt: skip
    else:
        for figure in figures:
            click.echo(figure)
    return DONE if ok else SHORT


def _what(grid: str | None, shape: tuple[Any, ...], dtype: str | None, page_size: int | None) -> str:
    """The grid to time, "shapes" for shapes."""
    if shape and grid:
        raise InvalidInput(f"either --shape or --grid {grid}")
    if not shape and (dtype or page_size):
        raise InvalidInput("--dtype and --page-size are for --shape; a grid has its own")
    return "shapes" if shape else grid or "peers"


def _check(what: str, against: tuple[str, ...], runs: int | None, hinted: bool, apart: bool) -> None:
    from mla_jit.tuning import peers

    if unknown := set(against) - set(peers.PEERS):
        raise InvalidInput(f"no peer {', '.join(sorted(unknown))}; there is {', '.join(peers.PEERS)}")
    if against and what not in (*_WITH_PEERS, "ragged", "host"):
        raise InvalidInput(
            f"--against is for the grids peers, q2, databases, ragged and host and for --shape, not for {what}"
        )
    if hinted and what not in _WITH_PEERS:
        raise InvalidInput(f"--capacity-hint is for the grids peers, q2 and databases and for --shape, not for {what}")
    if apart and what not in ("peers", "q2", "shapes"):
        raise InvalidInput(f"--apart is for the grids peers and q2 and for --shape, not for {what}")
    if runs and what in _PROOFS:
        raise InvalidInput(f"--runs is not for {what}, which measures as often as it needs")


def _shapes(sizes: Iterable[tuple[int, int, int, int]], dtype: str, page_size: int) -> list[Shape]:
    from mla_jit import models, target
    from mla_jit.tuning.bench import Shape

    found = []
    for heads, batch, kv_len, q_len in sizes:
        q, cache = models.dtypes_on(dtype, target.here())
        found.append(Shape(heads, (kv_len,) * batch, q_len, page_size, cache, q_dtype=q))
    return found


def _rows(
    what: str, device: str, shapes: list[Shape], against: tuple[str, ...], runs: int, hinted: bool, apart: bool,
    seconds: dict[str, float],
) -> Iterable[Any]:  # fmt: skip
    """The rows, as they come; `seconds` of what took long."""
    from mla_jit import api
    from mla_jit.tuning import grids, overhead, prefill_grid

    if what == "host":
        return overhead.host_rows(against, runs=runs)
    if what == "first-call":
        return overhead.first_rows(runs=runs)
    if what == "capture":
        return grids.capture_rows(api.decode, runs=runs)
    if what == "ragged":
        return grids.ragged_rows(api.decode, against, runs=runs)
    if what == "prefill":
        return prefill_grid.rows(runs=runs)
    if what == "databases":
        return grids.database_rows(api.decode, against, grid=grids.peers_grid(1, device), runs=runs, hinted=hinted)
    if what in _PROOFS:
        return _proof_rows(what, seconds)
    grid = [(shape, {}) for shape in shapes] if shapes else grids.peers_grid(2 if what == "q2" else 1, device)
    return grids.rows(api.decode, grid, against, runs=runs, hinted=hinted, apart=apart)


def _proof_rows(what: str, seconds: dict[str, float]) -> Iterator[Any]:
    from mla_jit import target
    from mla_jit.tuning import proofs, sweep

    def say(how: str, done: sweep.Finished) -> None:
        click.echo(f"… {how}: {proofs.say(done.problem)}, {done.seconds:.1f} s", err=True)

    if what == "neighbours":
        yield from proofs.neighbour_rows(target.here(), "cuda:0")
        return
    yield from proofs.quality_rows(target.here(), "cuda:0", on_time=seconds.__setitem__, on_shape=say)


def _figures(what: str, rows: list[Any], seconds: dict[str, float]) -> list[Figure]:
    from mla_jit.tuning import grids

    if what == "quality":
        return grids.quality_figures(rows, seconds)
    if what in ("host", "first-call"):
        return []
    if what == "capture":
        return grids.capture_figures(rows)
    if what == "ragged":
        return grids.ragged_figures(rows)
    if what == "prefill":
        return grids.prefill_figures(rows)
    if what == "databases":
        return grids.database_figures(rows)
    return grids.neighbour_figures(rows) if what == "neighbours" else grids.score_figures(rows)


def _line(cells: Iterable[tuple[Any, str]]) -> str:
    """Values in their formats, side by side; "-" for one that is missing."""
    texts = []
    for value, spec in cells:
        if isinstance(value, dict):
            value = " ".join(f"{name} {'-' if us is None else format(us, '.1f')}" for name, us in value.items())
        elif isinstance(value, tuple):
            value = ", ".join(value)
        elif value is None:
            value, spec = "-", spec.partition(".")[0]
        texts.append(format(value, spec))
    return "  ".join(texts).rstrip()
