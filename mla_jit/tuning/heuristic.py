"""What a config is predicted to take: an analytic model of the split-K kernels, good for ranking candidates.

Its constants are fitted to times on one H200 (the README's table, and sweeps of the combine's tile, stages, block_n and
min_tiles), in µs there; on other targets they scale with what their rows in configs/targets.yaml say. Nothing chooses
by these times but the order in which candidates are measured and, with great reserve, predict.py. Imports neither torch
nor triton.
"""

from __future__ import annotations

import math
from typing import Any

from mla_jit.compile.artifact import Artifact
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.target import Target
from mla_jit.tuning import space

_START = 4.0  # until a program's first tile is asked for, and its result's way out
_SCHEDULE = 0.6  # to look at the lengths of a batch
_FLIGHT = 3.7  # from asking for a tile to its use, with the memory system loaded
_PORT = 3.0  # how much of its even share of the bandwidth one SM can draw when others are idle
_MEMORY = 0.9  # of the bandwidth that a stream of tiles reaches
_L2 = 2.0  # how much faster than memory bytes come that another block of rows reads at the same time
_TILE = 0.1  # of a tile that overlaps with nothing: softmax, barriers
_SHARE = {"specialised": 0.84, "m64": 0.4, "mma": 0.35}  # of the matrix rate, by kind of kernel
_TOGETHER = 3.0  # for the programs of a cluster to put their pieces together; estimated, not fitted
_COMBINE = 0.7  # of one round of a program of the combine
_PARTIALS = 1.2  # of 2^20 partials, with the masked ones, through 132 SMs
_PROGRAM = 0.15  # of each program of the combine on one SM
_ROUND = 0.3  # of further rounds: they wait for memory, each for the one before
_PTX_PROGRAM = 0.73  # of each program of combine.ptx on one SM
_PTX_ROUND = 0.8  # of its further rounds
_SPILL = 1000.0  # bytes a thread that cost as much again as the work itself


def predicted_us(
    problem: Any, target: Target, variant: Variant, config: Config, artifact: Artifact | None = None
) -> float:
    """The time of one call at the length bound, µs. Variants that are no split-K kernel say it by their own `cost`.

    `artifact`: the compiled first kernel. Its registers, shared memory and spills are then counted, not guessed, and
    tiles that are gathered are in flight as far as it has room for them, whatever num_stages says.
    """
    if variant.host is not None or "combine_d" not in config or "num_kv_splits" not in config:
        return variant.cost(problem, target, config).time_us
    numbers = variant.numbers(problem, target, config)
    cut = space.pieces(problem, target, variant, config)
    time_us = target.launch_us + _stage1(problem, target, variant, config, cut, artifact)
    if numbers.get("wave", 0) > 0:
        time_us += _SCHEDULE
    if cut > 1 and config.get("together") and numbers["num_splits"] == 2 and not problem.batch_invariant:
        time_us += _TOGETHER
    elif cut > 1:
        time_us += target.launch_us + _combine(problem, target, config, cut)
    return time_us


def _stage1(
    p: DecodeProblem, target: Target, variant: Variant, config: Config, cut: int, artifact: Artifact | None
) -> float:
    """The first kernel: rounds of as many programs as the device holds, each a stream of tiles."""
    warp_specialised = "lazy" in config
    block_m, block_n = config.int("block_m"), config.int("block_n")
    stages = config.int("num_stages") if "num_stages" in config else 2
    latent, rope = bucket(max(16, p.kv_lora_rank)), bucket(p.rope_dim)
    tile_bytes = block_n * p.head_dim * DTYPES[p.kv_dtype].bytes

    threads = config.int("num_warps") * int(target.triton[2])
    registers = block_m * latent / threads + 72  # of the accumulator, and of all else
    queries = block_m * (latent + rope) * 2 if block_m >= 32 else 0
    shared = max(1, stages) * block_n * (latent + rope) * DTYPES[p.kv_dtype].bytes + queries
    ahead = max(1, stages - 1)  # tiles in flight
    strain = 1.0 + max(0.0, registers - 0.9 * target.registers) / 60  # spills
    if shared > target.smem_bytes and not warp_specialised:
        strain *= 2.0  # the compiler will refuse it, or overlap less
    if artifact is not None:
        threads, registers, shared = artifact.threads, max(1, artifact.registers), max(1, artifact.smem_bytes)
        strain = 1.0 + artifact.spill_bytes / _SPILL
        if not config.get("tma", True):
            ahead = _gathered(p, config, artifact)
    by_registers = int(target.registers_sm / (threads * min(registers, target.registers)))
    resident = max(1, min(target.smem_bytes // shared, by_registers))

    row_blocks = -(-max(p.rows, 1) // block_m)
    tiles = max(1, -(-space.length(p) // block_n))
    programs = max(1, p.batch) * row_blocks * p.num_kv_heads * cut
    per_program = -(-tiles // cut)
    active = min(programs, target.sms * resident)  # programs
    busy = min(programs, target.sms)  # SMs
    on_one = active / busy

    # bytes: an SM draws its port's width at most, all of them the device's bandwidth
    draw = target.bandwidth_gbps * 1e3 / target.sms  # bytes/µs, an even share
    fresh = 1 / row_blocks + (1 - 1 / row_blocks) / _L2  # of a tile's bytes, in those that come from memory
    memory = tile_bytes * on_one / min(draw * _PORT, draw * _MEMORY * target.sms / busy / fresh)
    kind = "specialised" if warp_specialised else "m64" if block_m >= 64 and target.has("mma_m64") else "mma"
    flops = 2 * block_m * block_n * (p.head_dim + p.kv_lora_rank)
    products = flops / (target.bf16_tflops * 1e6 / target.sms * _SHARE[kind]) * on_one
    # from the second tile on a program waits if too little is in flight
    deep = 2.0 if warp_specialised else ahead * (1.0 if config.get("tma", True) else 0.8)
    per_tile = max(memory, products)
    waits = max(0.0, _FLIGHT / deep - per_tile) * (per_program - 1)
    overlap = 3 if warp_specialised else min(ahead, 2) * (1.0 if config.get("tma", True) else 0.7)
    alone = _TILE / overlap
    stream = (per_program * (per_tile + alone) + waits) * strain

    rounds = programs / (target.sms * resident)
    waves = max(1.0, rounds if rounds > 4 else (math.ceil(rounds) + rounds) / 2)
    wide = cut > 1 and "combine_s" in config  # fp32 partials
    written = programs * block_m * p.kv_lora_rank * (4 if wide else 2) / (target.bandwidth_gbps * 1e3 * _L2)
    return _START * (1 + 0.25 * (waves - 1)) + stream * waves + written


def _gathered(p: DecodeProblem, config: Config, artifact: Artifact) -> int:
    """Gathered tiles that a compiled kernel may have in flight: as its shared memory has copies, beside the queries.

    Triton does not pipeline gathers through a page table: with 2, 3 and 4 stages kernels have the same shared memory,
    and on the H200 took the same time.
    """
    latent, rope = bucket(max(16, p.kv_lora_rank)), bucket(p.rope_dim)
    queries = config.int("block_m") * (latent + rope) * 2
    copies = (artifact.smem_bytes - queries) / (config.int("block_n") * latent * DTYPES[p.kv_dtype].bytes)
    return max(1, min(2, round(copies)))


def _combine(p: DecodeProblem, target: Target, config: Config, cut: int) -> float:
    """The second kernel: programs that each hold a tile of partials and go over the pieces in rounds."""
    heads, columns = (config.int(f"combine_{axis}") for axis in "hd")
    heads, columns = min(heads, bucket(p.num_heads)), min(columns, bucket(p.kv_lora_rank))
    tokens = p.q_len * max(1, p.batch)
    programs = -(-p.kv_lora_rank // columns) * -(-p.num_heads // heads) * tokens
    if "combine_s" not in config:  # combine.ptx: 256 threads with so many pieces of 8 columns each at a time
        rounds = -(-cut * heads * columns // (8 * 256 * config.int("combine_ahead")))
        return _COMBINE + _PTX_ROUND * (rounds - 1) + _PTX_PROGRAM * programs / target.sms
    held = config.int("combine_s")
    rounds = -(-cut // held)
    partials = rounds * held * tokens * p.num_heads * p.kv_lora_rank
    a_thread = held * heads * columns / 128
    waiting = _ROUND * (rounds - 1) ** 1.6 * (1 + 16 / a_thread)
    return _COMBINE + waiting + _PARTIALS * partials / 2**20 * 132 / target.sms + _PROGRAM * programs / target.sms
