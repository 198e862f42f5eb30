"""Our prefill beside cuDNN's, through torch's attention: the rows of `mla-tune bench --grid prefill`.

Un-absorbed, bf16, 192 + 128 elements a head. Times are of eager calls between events, ours and cuDNN's in turn, on
inputs larger than the L2: ours as a call has it, with each scheduler, and on the same inputs in fp8. Before that,
sampled rows of the outputs are compared with float64. Uneven prompts have no peer: their rate is held against ours on
as many equal ones of the same work.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_jit import api, api_prefill, dtypes
from mla_jit.errors import MlaJitError

QK_DIM, V_DIM = 192, 128
LEAST_SCORE, LEAST_RATE = 0.8, 0.9  # aims: cuDNN's time ÷ ours on each shape; uneven ÷ equal rate
LEAST_LISTED, LEAST_FP8 = 1.0, 1.2  # aims: tiles' time ÷ persistent's on uneven prompts; bf16's time ÷ fp8's
SCHEDULERS = ("tiles", "persistent")
_FP8 = torch.float8_e4m3fn
_SAMPLED = 64  # rows of the output that are checked
_CALLS = 3  # between two events
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Prompt:
    """Prompts of these lengths, all heads with K and V of their own."""

    lens: tuple[int, ...]
    heads: int
    causal: bool
    label: str = ""

    def __str__(self) -> str:
        sizes = self.label or f"{len(self.lens)} × {self.lens[0]}"
        return f"{sizes} × {self.heads} heads, {'causal' if self.causal else 'full'}"

    @property
    def flops(self) -> float:
        """2·(192 + 128) a query, key and head; half of them if causal."""
        return 2 * (QK_DIM + V_DIM) * self.heads * sum(n * n for n in self.lens) * (0.5 if self.causal else 1.0)

    @property
    def even(self) -> bool:
        return len(set(self.lens)) == 1


def _uneven(count: int = 24, low: int = 64, high: int = 16384, seed: int = 0) -> tuple[int, ...]:
    """Log-uniform lengths, the same everywhere."""
    rng = random.Random(seed)
    return tuple(round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(count))


_SIZES = ((1, 8192, 128), (16, 1024, 128), (4, 4096, 16), (1, 16384, 16), (1, 32768, 16))  # sequences, tokens, heads
GRID = tuple(Prompt((n,) * count, heads, causal) for count, n, heads in _SIZES for causal in (True, False))
UNEVEN = Prompt(_uneven(), 16, True, "uneven 24")
EQUAL = Prompt((round(math.sqrt(sum(n * n for n in UNEVEN.lens) / 24)),) * 24, 16, True)


@dataclass(frozen=True)
class PromptRow:
    """A shape, in µs: ours (median, least and largest of the runs) and cuDNN's, None where it has none; TFLOP/s.

    tiles_us, persistent_us: ours with that scheduler; fp8_us: on the same inputs in fp8 e4m3. error: relative L2 error
    of the worst sampled row of all bf16 runs. provenance: of the config, as `Dispatch` has it.
    `score` is cuDNN's time ÷ ours.
    """

    shape: str
    variant: str
    ours_us: float
    low_us: float
    high_us: float
    tflops: float
    cudnn_us: float | None
    cudnn_tflops: float | None
    error: float
    provenance: str = ""
    tiles_us: float | None = None
    persistent_us: float | None = None
    fp8_us: float | None = None

    @property
    def score(self) -> float | None:
        return None if self.cudnn_us is None else self.cudnn_us / self.ours_us


def rows(
    shapes: Sequence[Prompt] = (*GRID, EQUAL, UNEVEN), *, runs: int = 3, device: str = "cuda"
) -> Iterator[PromptRow]:  # fmt: skip
    """Our prefill, `runs` times each on fresh inputs, cuDNN alternated. MlaJitError for a wrong row."""
    for shape in shapes:
        found = [measured(shape, seed, device) for seed in range(runs)]
        times = {name: [run.times_us[name] for run in found] for name in found[0].times_us}
        medians = {name: statistics.median(us) for name, us in times.items()}
        us, peer = medians["mla_jit"], medians.get("cudnn")
        yield PromptRow(
            str(shape), found[-1].variant, us, min(times["mla_jit"]), max(times["mla_jit"]), shape.flops / us * 1e-6,
            peer, None if peer is None else shape.flops / peer * 1e-6, max(run.error for run in found),
            found[-1].provenance, *(medians.get(name) for name in (*SCHEDULERS, "fp8")),
        )  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Of one run: µs by "mla_jit", scheduler, "fp8" and, for equal lengths, "cudnn"; the worst sampled error of the
    bf16 calls; what served, from where."""

    times_us: dict[str, float]
    error: float
    variant: str
    provenance: str = ""


def measured(shape: Prompt, seed: int, device: str, rounds: int = 7) -> Measured:
    """One run on fresh inputs: checked, then timed."""
    made = torch.Generator(device).manual_seed(seed)
    tokens, heads = sum(shape.lens), shape.heads
    q, k = (
        torch.randn(tokens, heads, QK_DIM, device=device, dtype=torch.bfloat16, generator=made) for _ in range(2)
    )  # fmt: skip
    v = torch.randn(tokens, heads, V_DIM, device=device, dtype=torch.bfloat16, generator=made)
    indptr = torch.tensor([0, *itertools.accumulate(shape.lens)], dtype=torch.int32, device=device)
    scale = QK_DIM**-0.5
    wide, narrow = (q, k, v), (q.to(_FP8), k.to(_FP8), v.to(_FP8))
    longest = max(shape.lens)

    def call(tensors: tuple[Tensor, Tensor, Tensor], scheduler: str) -> Call:
        out = torch.full_like(v, float("nan"))

        def run() -> Tensor:
            api_prefill.prefill(
                *tensors, qo_indptr=indptr, kv_indptr=indptr, max_q_len=longest, max_kv_len=longest, sm_scale=scale,
                causal=shape.causal, out=out, scheduler=scheduler,
            )  # fmt: skip
            return out

        return run

    def checked(tensors: tuple[Tensor, Tensor, Tensor], run: Call, dtype: str) -> float:
        error = worst_error(shape, *tensors, run(), scale, random.Random(seed))
        limit = dtypes.tolerance(dtype, dtype)
        if not error <= limit:
            raise MlaJitError(
                f"prefill is wrong on {shape}, {dtype}: relative L2 error {error:.2e} of a row (limit {limit:.0e})"
            )
        return error

    calls = {"fp8": call(narrow, "auto")} | {name: call(wide, name) for name in SCHEDULERS}
    calls["mla_jit"] = call(wide, "auto")
    checked(narrow, calls["fp8"], "fp8_e4m3")
    errors = [checked(wide, calls[name], "bf16") for name in (*SCHEDULERS, "mla_jit")]
    dispatch = api.last_dispatch()
    if shape.even and (peer := cudnn(shape, q, k, v, scale)) is not None:
        calls["cudnn"] = peer
    served = ("", "") if dispatch is None else (dispatch.variant, dispatch.provenance)
    return Measured(_alternated(calls, rounds), max(errors), *served)


def worst_error(
    shape: Prompt, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, rng: random.Random
) -> float:  # fmt: skip
    """The largest relative L2 error of sampled rows against float64; infinite where there is a NaN anywhere."""
    if bool(out.isnan().any()):
        return math.inf
    starts, worst = [0, *itertools.accumulate(shape.lens)], 0.0
    for _ in range(_SAMPLED):
        b, head = rng.randrange(len(shape.lens)), rng.randrange(shape.heads)
        n = shape.lens[b]
        i = rng.choice((0, n - 1, rng.randrange(n)))
        keys = slice(starts[b], starts[b] + (i + 1 if shape.causal else n))
        logits = k[keys, head].double() @ q[starts[b] + i, head].double() * scale
        want = torch.softmax(logits, 0) @ v[keys, head].double()
        worst = max(worst, float((out[starts[b] + i, head].double() - want).norm() / want.norm()))
    return worst


def cudnn(shape: Prompt, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call | None:
    """torch's attention by cuDNN on the same tensors; None where it refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def batched(x: Tensor) -> Tensor:
        return x.view(len(shape.lens), shape.lens[0], shape.heads, -1).transpose(1, 2)

    query, key, value = batched(q), batched(k), batched(v)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=shape.causal, scale=scale)

    try:
        call()
    except RuntimeError:
        return None
    return call


def _alternated(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """µs a call: the median over rounds, in turn, every other round in the opposite order."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(_CALLS):
                calls[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / _CALLS)
    return {name: statistics.median(us) for name, us in times.items()}
