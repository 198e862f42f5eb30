"""The PTX emulator: what instructions compute, a small GEMM with TMA and wgmma, and that planted mistakes are found."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ptx_machine as pm
import pytest

from mla_jit.compile.ptx import assembler

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
SMEM = ".extern .shared .align 1024 .b8 smem[];\n"


def assemble(text: str, path: Path) -> None:
    """Triton's ptxas takes the text: the tests speak real PTX."""
    path.write_text(text)
    done = subprocess.run(
        [assembler(), "-arch=sm_90a", "-O1", path, "-o", path.with_suffix(".cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def launch(
    text: str, arrays: dict[str, np.ndarray], arguments: list[Any], grid: int = 1, smem: int = 0, **options: Any
) -> pm.Statistics:
    memory = pm.Memory()
    for name, array in arrays.items():
        memory.add(name, array.ctypes.data, array.nbytes, writable=name.startswith("out"))
    return pm.run(pm.parse(text), grid, arguments, memory, smem, **options)


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16 (no NaN), as its 16 bits."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def wide(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------------- instructions
X = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
Y = np.random.default_rng(1).integers(0, 2**32, 32, dtype=np.uint32)
X[:4], Y[:4] = (0, 1, 0x80000000, 0xFFFFFFFF), (1, 0xFFFFFFFF, 7, 33)
F = np.random.default_rng(2).standard_normal(32).astype(np.float32) * 100
G = np.random.default_rng(3).standard_normal(32).astype(np.float32)
LANE = np.arange(32, dtype=np.uint32)
SX, SY = X.view(np.int32), Y.view(np.int32)
Big = np.ndarray


def u64(x: Big) -> Big:
    return x.astype(np.uint64)


# x y: u32, sx sy the same as s32; f g: f32; lane; w0 w1: b64; h0 h1: b16; p q r: predicates; result in d or e (f32)
CASES: dict[str, Callable[[], Any]] = {
    "add.u32 d, x, y;": lambda: X + Y,
    "sub.s32 d, x, -5;": lambda: X + np.uint32(5),
    "mul.lo.u32 d, x, y;": lambda: X * Y,
    "mul.hi.u32 d, x, y;": lambda: (u64(X) * u64(Y)) >> 32,
    "mul.hi.s32 d, x, y;": lambda: (SX.astype(np.int64) * SY) >> 32,
    "mul.wide.u32 w0, x, y; mov.b64 {c, d}, w0;": lambda: (u64(X) * u64(Y)) >> 32,
    "mul.wide.s32 w0, x, -3; cvt.u32.u64 d, w0;": lambda: SX.astype(np.int64) * -3,
    "mad.lo.s32 d, x, 3, y;": lambda: X * np.uint32(3) + Y,
    "mad.wide.u32 w0, x, y, 5; shr.u64 w0, w0, 16; cvt.u32.u64 d, w0;": lambda: (u64(X) * u64(Y) + np.uint64(5)) >> 16,
    "div.u32 d, x, 7;": lambda: X // 7,
    "div.s32 d, x, -7;": lambda: np.trunc(SX / -7.0).astype(np.int64),
    "rem.s32 d, x, 7;": lambda: np.fmod(SX, 7),
    "min.s32 d, x, y;": lambda: np.minimum(SX, SY),
    "max.u32 d, x, y;": lambda: np.maximum(X, Y),
    "abs.s32 d, x;": lambda: np.abs(SX.astype(np.int64)),
    "neg.s32 d, x;": lambda: -SX.astype(np.int64),
    "not.b32 d, x;": lambda: ~X,
    "and.b32 d, x, 0xff00ff;": lambda: X & 0xFF00FF,
    "xor.b32 d, x, y;": lambda: X ^ Y,
    "shl.b32 d, x, lane;": lambda: X << LANE,
    "shl.b32 d, x, 32;": lambda: X * 0,
    "shr.u32 d, x, 5;": lambda: X >> 5,
    "shr.s32 d, x, 40;": lambda: SX >> 31,
    "shf.l.wrap.b32 d, x, y, 8;": lambda: (Y << 8) | (X >> 24),
    "shf.r.wrap.b32 d, x, y, 8;": lambda: (X >> 8) | (Y << 24),
    "bfe.u32 d, x, 4, 7;": lambda: (X >> 4) & 127,
    "bfe.s32 d, x, 28, 4;": lambda: SX >> 28,
    "bfi.b32 d, x, y, 8, 8;": lambda: (Y & ~np.uint32(0xFF00)) | ((X & 255) << 8),
    "prmt.b32 d, x, y, 0x5410;": lambda: (X & 0xFFFF) | (Y << 16),
    "lop3.b32 d, x, y, lane, 0xe8;": lambda: (X & Y) | (X & LANE) | (Y & LANE),
    "clz.b32 d, x;": lambda: [32 - int(v).bit_length() for v in X],
    "popc.b32 d, x;": lambda: [int(v).bit_count() for v in X],
    "bfind.u32 d, x;": lambda: [(int(v).bit_length() - 1) & 0xFFFFFFFF for v in X],
    "setp.lt.s32 p, x, y; selp.b32 d, 1, 2, p;": lambda: np.where(SX < SY, 1, 2),
    "setp.hi.u32 p|q, x, y; and.pred r, p, q; @!q mov.b32 d, 5; @q mov.b32 d, 6;": lambda: np.where(X > Y, 5, 6),
    "setp.lt.u32 p, lane, 9; setp.gt.or.s32 q, x, y, !p; selp.u32 d, 3, 4, q;": lambda: np.where(
        (SX > SY) | (LANE >= 9), 3, 4
    ),
    "setp.lt.u32 p, lane, 9; not.pred q, p; xor.pred q, q, p; selp.u32 d, 1, 0, q;": lambda: np.ones(32),
    "setp.neu.f32 p, f, 0f7fc00000; selp.u32 d, 1, 0, p;": lambda: np.ones(32),
    "setp.ne.f32 p, f, 0f7fc00000; selp.u32 d, 1, 0, p;": lambda: np.zeros(32),
    "cvt.u16.u32 h0, x; cvt.u32.u16 d, h0;": lambda: X & 0xFFFF,
    "cvt.u16.u32 h0, x; cvt.s32.s16 d, h0;": lambda: X.astype(np.uint16).view(np.int16).astype(np.int64),
    "cvt.s32.s8 d, x;": lambda: X.astype(np.uint8).view(np.int8).astype(np.int64),
    "cvt.s64.s32 w0, x; mov.b64 {c, d}, w0;": lambda: SX >> 31,
    "cvt.rzi.s32.f32 d, f;": lambda: np.trunc(F).astype(np.int64),
    "cvt.rmi.s32.f32 d, f;": lambda: np.floor(F).astype(np.int64),
    "cvt.rpi.u32.f32 d, f;": lambda: np.maximum(np.ceil(F), 0).astype(np.int64),
    "mov.b32 {h0, h1}, x; mov.b32 d, {h1, h0};": lambda: (X << 16) | (X >> 16),
    "mov.b64 w0, {x, y}; shr.b64 w0, w0, 16; cvt.u32.u64 d, w0;": lambda: (X >> 16) | (Y << 16),
    "shfl.sync.bfly.b32 d, x, 3, 31, -1;": lambda: X[LANE ^ 3],
    "shfl.sync.down.b32 d|p, x, 4, 0x181f, -1;": lambda: np.where(LANE % 8 < 4, X[(LANE + 4) % 32], X),
    "shfl.sync.up.b32 d|p, x, 1, 0, -1; @!p mov.b32 d, 9;": lambda: np.where(LANE > 0, X[(LANE + 31) % 32], 9),
    "shfl.sync.idx.b32 d, x, 5, 31, -1;": lambda: np.full(32, X[5]),
    "setp.lt.s32 p, x, y; vote.sync.ballot.b32 d, p, -1;": lambda: np.full(
        32, sum(1 << i for i in np.where(SX < SY)[0])
    ),
    "setp.lt.u32 p, lane, 9; vote.sync.any.pred q, p, -1; selp.u32 d, 1, 0, q;": lambda: np.ones(32),
    "setp.lt.u32 p, lane, 9; vote.sync.all.pred q, p, -1; selp.u32 d, 1, 0, q;": lambda: np.zeros(32),
    "redux.sync.max.u32 d, x, -1;": lambda: np.full(32, X.max()),
    "redux.sync.add.s32 d, x, -1;": lambda: np.full(32, X.sum(dtype=np.uint32)),
    "activemask.b32 d;": lambda: np.full(32, 0xFFFFFFFF),
    "elect.sync d|p, -1; mov.b32 d, 0; @p mov.b32 d, 1;": lambda: LANE == 0,
    "mov.u32 d, %laneid; mov.u32 c, %ntid.x; add.u32 d, d, c;": lambda: LANE + 32,
    "setp.lt.u32 p, lane, 5; mov.b32 d, 1; @p bra A; mov.b32 d, 2; A: add.u32 d, d, 10;": lambda: np.where(
        LANE < 5, 11, 12
    ),
    "mov.b32 d, 0; B: add.u32 d, d, 1; setp.lt.u32 p, d, lane; @p bra B;": lambda: np.maximum(LANE, 1),
    "cvt.rn.bf16x2.f32 d, f, g;": lambda: (bf16(F).astype(np.uint32) << 16) | bf16(G),
    "cvt.rn.f16x2.f32 d, f, g;": lambda: np.stack([G, F], 1).astype(np.float16).view(np.uint32)[:, 0],
    "cvt.rn.bf16x2.f32 c, f, g; cvt.rn.bf16x2.f32 d, g, f; add.rn.bf16x2 d, c, d;": lambda: (
        bf16(wide(bf16(F)) + wide(bf16(G))).astype(np.uint32) * np.uint32(0x10001)
    ),
}
FLOATS: dict[str, tuple[Callable[[], Any], float]] = {
    "fma.rn.f32 e, f, g, f;": (lambda: F.astype(np.float64) * G + F, 1e-7),
    "mul.f32 e, f, 0f40000000;": (lambda: F * 2, 0),
    "max.f32 e, f, 0f7fc00000;": (lambda: F, 0),
    "min.NaN.f32 e, f, 0f7fc00000;": (lambda: F * np.nan, 0),
    "neg.f32 e, f;": (lambda: -F, 0),
    "abs.f32 e, f;": (lambda: abs(F), 0),
    "ex2.approx.ftz.f32 e, g;": (lambda: np.exp2(G), 1e-6),
    "abs.f32 e, g; lg2.approx.ftz.f32 e, e;": (lambda: np.log2(abs(G)), 1e-5),
    "rcp.approx.ftz.f32 e, g;": (lambda: 1 / G, 1e-6),
    "div.rn.f32 e, f, g;": (lambda: F / G, 0),
    "div.full.f32 e, f, g;": (lambda: F / G, 1e-6),
    "tanh.approx.f32 e, g;": (lambda: np.tanh(G), 1e-6),
    "cvt.rn.f32.s32 e, x;": (lambda: SX.astype(np.float32), 0),
    "cvt.rn.f32.u32 e, x;": (lambda: X.astype(np.float32), 0),
    "cvt.rn.bf16.f32 h0, f; cvt.f32.bf16 e, h0;": (lambda: wide(bf16(F)), 0),
    "cvt.rn.f16.f32 h0, f; cvt.f32.f16 e, h0;": (lambda: F.astype(np.float16).astype(np.float32), 0),
    "cvt.rn.satfinite.e4m3x2.f32 h0, f, g; cvt.rn.f16x2.e4m3x2 c, h0; mov.b32 {h0, h1}, c; cvt.f32.f16 e, h1;": (
        lambda: F,
        1 / 16,
    ),
    "mov.f32 e, 0f44000000; cvt.rn.satfinite.e4m3x2.f32 h0, g, e; cvt.rn.f16x2.e4m3x2 c, h0; mov.b32 {h0, _}, c; "
    "cvt.f32.f16 e, h0;": (
        lambda: np.full(32, 448.0),
        0,
    ),
    "mov.f32 e, 0f3f800000; add.f32 e, e, 1.5;": (lambda: np.full(32, 2.5), 0),
}


def instructions_text() -> str:
    parts = []
    for n, case in enumerate([*CASES, *FLOATS]):
        case = case.replace("A:", f"A{n}:").replace("bra A", f"bra A{n}").replace("B:", f"B{n}:")
        case = case.replace("bra B", f"bra B{n}")
        store = f"st.global.f32 [at+{128 * n}], e;" if n >= len(CASES) else f"st.global.b32 [at+{128 * n}], d;"
        parts.append(f"    {case} {store}")
    return (
        HEAD
        + """
.visible .entry cases(.param .u64 p_in, .param .u64 p_out)
.reqntid 32, 1, 1
{
    .reg .b32 x, y, lane, c, d; .reg .f32 f, g, e; .reg .b64 w0, w1, at, from; .reg .b16 h<2>; .reg .pred p, q, r;
    mov.u32 lane, %tid.x;
    ld.param.u64 from, [p_in]; ld.param.b64 at, [p_out];
    mul.wide.u32 w0, lane, 4; add.s64 at, at, w0; mul.wide.u32 w0, lane, 16; add.u64 from, from, w0;
    ld.global.nc.L1::no_allocate.v4.b32 {x, y, f, g}, [from];
"""
        + "\n".join(parts)
        + "\n    ret;\n}\n"
    )


def test_instructions() -> None:
    source = np.stack([X, Y, F.view(np.uint32), G.view(np.uint32)], 1).copy()
    out = np.zeros((len(CASES) + len(FLOATS), 32), np.uint32)
    statistics = launch(instructions_text(), {"in": source, "out": out}, [source.ctypes.data, out.ctypes.data])
    for n, (case, expected) in enumerate(CASES.items()):
        want = (np.asarray(expected()).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
        np.testing.assert_array_equal(out[n], want, err_msg=case)
    for n, (case, (value, rtol)) in enumerate(FLOATS.items(), len(CASES)):
        np.testing.assert_allclose(out[n].view(np.float32), value(), rtol=rtol, atol=rtol / 8, err_msg=case)
    assert statistics.global_read == 512
    assert statistics.global_written == out.nbytes


def test_instructions_assemble(tmp_path: Path) -> None:
    assemble(instructions_text(), tmp_path / "cases.ptx")


def small(body: str, threads: int = 32, regs: str = "", module: str = SMEM) -> str:
    """A kernel of one parameter, the output."""
    return f"""{HEAD}{module}.visible .entry k(.param .u64 p_out)
.reqntid {threads}, 1, 1
{{
    .reg .b32 r<32>, lane, warp; .reg .b64 rd<8>, out; .reg .pred p<8>; .reg .f32 f<8>;
    {regs}
    mov.u32 r0, %tid.x; and.b32 lane, r0, 31; shr.u32 warp, r0, 5;
    ld.param.u64 out, [p_out]; mul.wide.u32 rd0, r0, 4; add.s64 out, out, rd0;
    {body}
    ret;
}}
"""


def run_small(body: str, threads: int = 32, regs: str = "", module: str = SMEM, **options: Any) -> np.ndarray:
    out = np.zeros(1024, np.uint32)
    smem = options.pop("smem", 8192)
    launch(small(body, threads, regs, module), {"out": out}, [out.ctypes.data], smem=smem, **options)
    return out


def test_matrices_pass_through_shared_memory(tmp_path: Path) -> None:
    body = """
    shl.b32 r1, lane, 4; add.u32 r1, r1, 1024; mov.u32 r2, smem; add.u32 r1, r1, r2;
    mov.b32 r4, lane; add.u32 r5, lane, 32; add.u32 r6, lane, 64; add.u32 r7, lane, 96;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [r1], {r4, r5, r6, r7};
    shl.b32 r3, lane, 2; add.u32 r3, r3, r2; ld.shared.b32 r8, [r3+1152];
    st.global.b32 [out], r8;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r9, r10, r11, r12}, [r1];
    st.global.b32 [out+128], r12;
    stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [r1], {r4};
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {r9}, [r1];
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r10}, [r1];
    st.global.b32 [out+256], r9; st.global.b32 [out+384], r10;
    """
    assemble(small(body), tmp_path / "matrix.ptx")
    out = run_small(body)
    np.testing.assert_array_equal(out[:32], LANE + 32)
    np.testing.assert_array_equal(out[32:64], LANE + 96)
    np.testing.assert_array_equal(out[64:96], LANE)
    elements = LANE.view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(out[96:128].view(np.uint16).reshape(8, 8), elements.T)


@pytest.mark.parametrize(("how", "word"), [("or", 40), ("or", 99), ("and", 99), ("and", 3)])
def test_a_barrier_says_whether_it_was_true_of_any_or_of_all(how: str, word: int, tmp_path: Path) -> None:
    """Of 64 threads of 96, in two warps: of thread 40 alone, of none (or of all but 3)."""
    true = f"setp.{'eq' if how == 'or' else 'ne'}.u32 p0, r0, {word};"
    body = f"""
    {true} setp.eq.u32 p1, warp, 2; @p1 bra A;
    bar.red.{how}.pred p0, 1, 64, p0;
    selp.b32 r1, 1, 0, p0; st.global.b32 [out], r1;
A:
    """
    assemble(small(body, 96), tmp_path / "red.ptx")
    out = run_small(body, 96)
    np.testing.assert_array_equal(out[:64], (word < 64) if how == "or" else (word >= 64))
    np.testing.assert_array_equal(out[64:96], 0)


def test_the_last_cta_knows_it() -> None:
    text = (
        HEAD
        + """
.visible .entry k(.param .u64 counter, .param .u64 p_out) .maxntid 64
{
    .reg .b64 c, o, w; .reg .b32 n, t, x; .reg .pred p;
    .shared .align 4 .b8 flag[4];
    ld.param.u64 c, [counter]; ld.param.u64 o, [p_out]; cvta.to.global.u64 c, c;
    mov.u32 t, %tid.x; mov.u32 x, %ctaid.x; mul.wide.u32 w, x, 4; add.s64 w, o, w;
    setp.ne.u32 p, t, 0;
    @p bra WAIT;
    add.u32 x, x, 1; st.global.b32 [w], x; fence.acq_rel.gpu;
    atom.add.acq_rel.gpu.global.u32 n, [c], 1;
    st.shared.b32 [flag], n;
    red.relaxed.gpu.global.max.u32 [c+4], n;
WAIT:
    bar.sync 0;
    ld.shared.b32 n, [flag];
    setp.ne.u32 p, n, 7; @p bra END;
    { .reg .pred q; setp.lt.u32 q, t, 8; @q bra SUM; bra END; SUM: }
    mul.wide.u32 w, t, 4; add.s64 w, o, w; ld.acquire.gpu.global.b32 x, [w]; mul.lo.u32 x, x, 10;
    st.global.b32 [w], x;
END:
    ret;
}
"""
    )
    for options in ({}, {"concurrent": 4}, {"order": "sequential"}):
        counter, out = np.zeros(2, np.uint32), np.zeros(8, np.uint32)
        arguments = [counter.ctypes.data, out.ctypes.data]
        launch(text, {"out counter": counter, "out": out}, arguments, grid=8, seed=3, **options)
        assert counter.tolist() == [8, 7]
        np.testing.assert_array_equal(out, 10 * (np.arange(8) + 1))


# ---------------------------------------------------------------------- single mistakes
INIT = """
    setp.ne.u32 p0, r0, 0; @p0 bra INIT;
    mbarrier.init.shared::cta.b64 [smem], 1; fence.mbarrier_init.release.cluster;
INIT: bar.sync 0;
"""
WAIT0 = "{ .reg .pred done; W: mbarrier.try_wait.parity.shared::cta.b64 done, [smem], 0; @done bra D; bra W; D: }"
MISTAKES: dict[str, tuple[type[pm.MachineError], str, int, str]] = {
    "uninitialised register": (pm.Uninitialised, "r9", 32, "add.u32 r1, r9, 1;"),
    "uninitialised on some lanes": (
        pm.Uninitialised,
        "lane 5",
        32,
        "setp.lt.u32 p0, lane, 5; @p0 mov.b32 r1, 0; add.u32 r1, r1, 1;",
    ),
    "shared memory never written": (pm.Uninitialised, "smem\\+64", 32, "ld.shared.b32 r1, [smem+64];"),
    "store out of bounds": (pm.MemoryFault, "nearest is out", 64, "st.global.b32 [out+3968], r0;"),
    "store far away": (pm.MemoryFault, "nearest is out", 32, "st.global.b32 [out+1000000], r0;"),
    "misaligned": (pm.MemoryFault, "multiple of 8", 32, "mov.b64 rd1, 0; st.global.b64 [out+4], rd1;"),
    "shared out of bounds": (pm.MemoryFault, "outside", 32, "st.shared.b32 [smem+8192], r0;"),
    "trap": (pm.Trap, "lane 3", 32, "setp.eq.u32 p0, lane, 3; @p0 trap;"),
    "division by zero": (pm.MachineError, "zero", 32, "div.u32 r1, r0, lane;"),
    "write and read of two warps": (
        pm.Race,
        "warp",
        64,
        "setp.eq.u32 p0, warp, 0; @p0 st.shared.b32 [smem+16], 1; @!p0 ld.shared.b32 r1, [smem+16];",
    ),
    "read, then a write of another warp": (
        pm.Race,
        "not ordered after the read",
        64,
        """setp.eq.u32 p0, warp, 0; @p0 st.shared.b32 [smem+16], 1; bar.sync 0;
        ld.shared.b32 r1, [smem+16]; @p0 st.shared.b32 [smem+16], 2;""",
    ),
    "two lanes, one word": (pm.Race, "two lanes", 32, "st.shared.b32 [smem], lane;"),
    "arrive without a wait": (
        pm.Race,
        "not ordered after the write",
        64,
        """setp.eq.u32 p0, warp, 0; @!p0 bra B; st.shared.b32 [smem+16], 1; bar.sync 1, 64; bra C;
        B: bar.arrive 1, 64; ld.shared.b32 r1, [smem+16]; C:""",
    ),
    "barrier of unequal counts": (
        pm.ProtocolError,
        "threads",
        96,
        "setp.eq.u32 p0, warp, 0; @p0 bra A; bar.sync 1, 96; bra B; A: bar.sync 1, 64; B:",
    ),
    "barrier that asks and one that does not": (
        pm.ProtocolError,
        "of one kind here, not there",
        64,
        """setp.eq.u32 p0, warp, 0; @p0 bra A; bar.sync 1, 64; bra B; A: bar.red.or.pred p0, 1, 64, p0; B:""",
    ),
    "barrier with a count and without": (
        pm.ProtocolError,
        "without one there",
        64,
        "setp.eq.u32 p0, warp, 0; @p0 bra A; bar.sync 1; bra B; A: bar.arrive 1, 64; B:",
    ),
    "barrier that nobody completes": (pm.Deadlock, "waits at barrier 2: 32 of 64", 32, "bar.sync 2, 64;"),
    "barrier by half a warp": (
        pm.ProtocolError,
        "bar.sync",
        32,
        "setp.lt.u32 p0, lane, 16; @p0 bra A; bar.sync 0; A:",
    ),
    "shfl by half a warp": (
        pm.ProtocolError,
        "mask",
        32,
        "setp.lt.u32 p0, lane, 16; @p0 shfl.sync.bfly.b32 r1, r0, 1, 31, -1;",
    ),
    "mbarrier before init": (pm.ProtocolError, "before mbarrier.init", 32, WAIT0),
    "mbarrier twice": (pm.ProtocolError, "live mbarrier", 32, "mbarrier.init.shared::cta.b64 [smem], 1;"),
    "too many arrivals": (
        pm.ProtocolError,
        "more than it counts",
        32,
        INIT + "mbarrier.arrive.shared::cta.b64 _, [smem], 2;",
    ),
    "mbarrier without a barrier": (
        pm.ProtocolError,
        "mbarrier",
        64,
        """setp.eq.u32 p0, r0, 0; @p0 mbarrier.init.shared::cta.b64 [smem], 1; setp.eq.u32 p0, r0, 32;
        @p0 mbarrier.arrive.shared::cta.b64 _, [smem];""",
    ),
    "store over an mbarrier": (pm.ProtocolError, "holds an mbarrier", 32, INIT + "st.shared.b32 [smem], 0;"),
    "phase that never ends": (pm.Deadlock, "arrivals outstanding 1 of 1", 32, INIT + WAIT0),
    "bytes that never come": (
        pm.Deadlock,
        "bytes outstanding 16",
        32,
        INIT + "setp.eq.u32 p0, r0, 0; @p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 16;" + WAIT0,
    ),
    "setmaxnreg of one warp": (
        pm.ProtocolError,
        "alike",
        128,
        "setp.eq.u32 p0, warp, 0; @!p0 bra A; setmaxnreg.dec.sync.aligned.u32 24; A:",
    ),
    "setmaxnreg beyond the file": (pm.Deadlock, "registers", 512, "setmaxnreg.inc.sync.aligned.u32 240;"),
    "wgmma without a fence": (
        pm.ProtocolError,
        "wgmma.fence",
        128,
        """mov.b64 rd1, 0x4000004000010040; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3},
        rd1, rd1, 0, 1, 1, 0, 0;""",
    ),
    "wgmma of what nothing wrote": (
        pm.Uninitialised,
        "wgmma",
        128,
        """mov.b64 rd1, 0x4000004000010040; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, rd1, rd1, 0, 1, 1, 0, 0;""",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str) -> None:
    error, message, threads, body = MISTAKES[name]
    with pytest.raises(error, match=message) as caught:
        run_small(body, threads)
    if error is not pm.Deadlock and "alike" not in message:
        assert caught.value.line > 5
        assert caught.value.text


ALONE = f"elect.sync _|p2, -1; @!p2 bra MET; {WAIT0} MET: bar.warp.sync -1;"


def test_lanes_wait_for_one_that_waits_elsewhere() -> None:
    """An elected lane waits for another warp at an mbarrier, the others for it; then they go on as one."""
    body = f"""{INIT} setp.ne.u32 p1, warp, 0; @p1 bra OTHER;
    {ALONE} bar.warp.sync -1; shfl.sync.idx.b32 r3, lane, 5, 31, -1; bra END;
    OTHER: setp.eq.u32 p3, lane, 0; @p3 mbarrier.arrive.shared::cta.b64 _, [smem]; mov.b32 r3, 9;
    END: st.global.b32 [out], r3;"""
    for seed in range(6):
        out = run_small(body, 64, seed=seed)
        np.testing.assert_array_equal(out[:64], np.repeat([5, 9], 32))
    with pytest.raises(pm.Deadlock, match=r"waits at bar\.warp\.sync for lanes 0x00000001"):
        run_small(INIT + ALONE, 32)


def test_ordered_accesses_are_no_race() -> None:
    body = """
    setp.eq.u32 p0, warp, 0; shl.b32 r1, lane, 2; mov.u32 r2, smem; add.u32 r1, r1, r2;
    @!p0 bra READ;
    st.shared.b32 [r1+64], lane; bar.arrive 1, 64; bar.sync 2, 64; st.shared.b32 [r1+64], 7; bra END;
    READ: bar.sync 1, 64; ld.shared.b32 r3, [r1+64]; bar.arrive 2, 64; st.global.b32 [out], r3;
    END:
    """
    for seed in range(5):
        np.testing.assert_array_equal(run_small(body, 64, seed=seed)[32:64], LANE)


@pytest.mark.parametrize("fence", [True, False])
def test_cp_async(fence: bool) -> None:
    """Copied with cp.async, published with a counted arrival, read by another warp."""
    body = (
        INIT.replace("[smem], 1", "[smem], 32")
        + """
    shl.b32 r1, lane, 4; mov.u32 r2, smem; add.u32 r1, r1, r2; ld.param.u64 rd1, [p_out];
    setp.eq.u32 p1, warp, 1; @p1 bra READ;
    mul.wide.u32 rd2, lane, 16; add.s64 rd1, rd1, rd2;
    cp.async.cg.shared.global [r1+1024], [rd1], 16;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [smem];
    bra END;
    READ: """
        + (WAIT0 if fence else "")
        + "ld.shared.b32 r3, [r1+1024]; st.global.b32 [out+3840], r3; END:"
    )
    out = np.arange(1024, dtype=np.uint32)
    for seed in range(4):
        text = small(body, 64)
        if fence:
            launch(text, {"out": out}, [out.ctypes.data], smem=8192, seed=seed)
            np.testing.assert_array_equal(out[960 + 32 : 960 + 64], LANE * 4)
        else:
            with pytest.raises((pm.Race, pm.Uninitialised, pm.ProtocolError)):
                launch(text, {"out": out}, [out.ctypes.data], smem=8192, seed=seed)


# ---------------------------------------------------------------------- clusters
RELEASE, ACQUIRE = "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"
# Warp 0 of each CTA; out[rank] of its cluster is at `put`, that of the next CTA of the cluster at `get`.
NEIGHBOURS = """
    mov.u32 r1, %cluster_ctarank; mov.u32 r2, %cluster_nctarank; mov.u32 r3, %clusterid.x; mov.u32 r4, %ctaid.x;
    ld.param.u64 rd1, [p_out]; mul.lo.u32 r5, r3, r2; mul.wide.u32 rd2, r5, 128; add.s64 rd1, rd1, rd2;
    mul.wide.u32 rd2, lane, 4; add.s64 rd1, rd1, rd2; mul.wide.u32 put, r1, 128; add.s64 put, put, rd1;
    add.u32 r5, r1, 1; rem.u32 r5, r5, r2; mul.wide.u32 get, r5, 128; add.s64 get, get, rd1;
    mad.lo.u32 r6, r4, 100, lane;
"""
PUT, GET = "st.global.b32 [put], r6;", "ld.global.cg.b32 r7, [get];"
CLUSTER_REGS = ".reg .b64 put, get;"


def run_cluster(body: str, threads: int = 32, grid: int = 6, cluster: int = 3, **options: Any) -> np.ndarray:
    return run_small(NEIGHBOURS + body, threads, CLUSTER_REGS, grid=grid, cluster=cluster, **options)


def neighbours(grid: int, cluster: int) -> np.ndarray:
    """What each CTA reads of the next one."""
    cta = np.arange(grid)
    return (cta // cluster * cluster + (cta + 1) % cluster)[:, None] * 100 + LANE


def test_neighbours_in_a_cluster(tmp_path: Path) -> None:
    """In two phases: the values, then those that the neighbours have read."""
    body = f"""
    {PUT} {RELEASE} {ACQUIRE} {GET}
    barrier.cluster.arrive.aligned; add.u32 r7, r7, 5; barrier.cluster.wait.aligned;
    st.global.b32 [put], r7; {RELEASE} {ACQUIRE} ld.global.b32 r8, [get]; st.global.b32 [put+2048], r8;
    """
    assemble(small(NEIGHBOURS + body, 32, CLUSTER_REGS), tmp_path / "cluster.ptx")
    for grid, cluster, options in ((6, 3, {}), (10, 5, {}), (8, 2, {"concurrent": 2}), (6, 3, {"order": "sequential"})):
        for seed in range(3):
            out = run_cluster(body, grid=grid, cluster=cluster, seed=seed, **options).reshape(32, 32)
            want = neighbours(grid, cluster) + 5
            np.testing.assert_array_equal(out[:grid], want)
            base = np.arange(grid) // cluster * cluster
            np.testing.assert_array_equal(out[16 : 16 + grid], want[base + (np.arange(grid) + 1) % cluster])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PUT + GET, "ordered by barrier.cluster"),
        (PUT + f"barrier.cluster.arrive.relaxed.aligned; {ACQUIRE}" + GET, "read of out.* the write by warp 0 of CTA"),
        (f"{RELEASE} {PUT} {ACQUIRE}" + GET, "ordered by barrier.cluster"),
        (f"{PUT} {RELEASE}" + GET + ACQUIRE, "ordered by barrier.cluster"),
        (GET + PUT, "ordered by barrier.cluster"),
        (GET + f"barrier.cluster.arrive.relaxed; {ACQUIRE}" + PUT, "after the read by warp 0 of CTA"),
        ("st.global.b32 [rd1], r6;", "write of out.* after the write by warp 0 of CTA"),
        (f"{PUT} {RELEASE} {ACQUIRE} ld.global.nc.b32 r7, [get];", "ld.global.nc of out.* st.global"),
        (f"ld.global.nc.b32 r7, [get]; {RELEASE} {ACQUIRE} {PUT}", "reads with ld.global.nc"),
        (f"{PUT} {RELEASE} {ACQUIRE} ld.param.u64 rd3, [p_out]; ld.global.b32 r7, [rd3];", "another cluster"),
        (f"ld.param.u64 rd3, [p_out]; ld.global.b32 r7, [rd3]; {RELEASE} {ACQUIRE} {PUT}", "another cluster"),
    ],
)
def test_races_of_a_cluster(body: str, message: str) -> None:
    for seed in range(4):
        with pytest.raises(pm.Race, match=message) as caught:
            run_cluster(body, seed=seed)
        assert caught.value.cta is not None
        assert "global" in caught.value.text


def test_another_warp_passes_it_on() -> None:
    """Warp 0 writes and reads; warp 1 arrives and waits with order, and bar.sync joins them."""
    body = """
    setp.eq.u32 p0, warp, 0; @p0 st.global.b32 [put], r6; bar.sync 0;
    @p0 bra ZERO; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; bra ON;
    ZERO: barrier.cluster.arrive.relaxed.aligned; ON: bar.sync 1;
    @p0 ld.global.b32 r7, [get]; @p0 st.global.b32 [put+2048], r7;
    """
    for seed in range(3):
        out = run_cluster(body, 64, seed=seed).reshape(32, 32)
        np.testing.assert_array_equal(out[16:22], neighbours(6, 3))
    with pytest.raises(pm.Race, match=r"barrier\.cluster"):
        run_cluster(body.replace("bar.sync 1;", ""), 64)


def test_who_has_exited_need_not_arrive() -> None:
    """Some lanes, a warp of each CTA, and the last CTA of each cluster, before others arrive or after."""
    leave = """
    setp.eq.u32 p0, warp, 1; @p0 ret; add.u32 r8, r1, 1; setp.eq.u32 p0, r8, r2; @p0 ret;
    setp.eq.u32 p0, lane, 7; @p0 ret;
    """
    body = f"""
    {leave} {PUT} {RELEASE} {ACQUIRE} {RELEASE} {ACQUIRE}
    setp.eq.u32 p0, r1, 0; @p0 ld.global.b32 r7, [get]; @p0 st.global.b32 [put+2048], r7;
    """
    for seed in range(6):
        out = run_cluster(body, 64, seed=seed).reshape(32, 32)
        np.testing.assert_array_equal(out[[16, 19]][:, LANE != 7], neighbours(6, 3)[[0, 3]][:, LANE != 7])
        assert not out[[16, 19], 7].any()
    with pytest.raises(pm.Race, match=r"barrier\.cluster"):  # an exit publishes nothing
        run_cluster(f"setp.eq.u32 p0, r1, 1; @p0 {PUT} @p0 ret; {RELEASE} {ACQUIRE} {RELEASE} {ACQUIRE} {GET}")


def test_a_cta_is_a_cluster_of_one() -> None:
    """barrier.cluster orders shared memory as bar.sync does."""
    body = """
    shl.b32 r1, r0, 2; mov.u32 r2, smem; add.u32 r1, r1, r2; xor.b32 r3, r1, 128;
    st.shared.b32 [r1], r0; barrier.cluster.arrive; barrier.cluster.wait;
    ld.shared.b32 r4, [r3]; st.global.b32 [out], r4;
    """
    np.testing.assert_array_equal(run_small(body, 64)[:64], np.arange(64) ^ 32)
    with pytest.raises(pm.Race, match="not ordered after the write"):
        run_small(body.replace("arrive;", "arrive.relaxed;"), 64)


@pytest.mark.parametrize(
    ("error", "message", "body"),
    [
        (pm.Deadlock, r"phase 0 of barrier.cluster: CTA \(\d, 0, 0\) warp 1, .* did not arrive", "bar.sync 1, 64;"),
        (
            pm.Deadlock,
            "warp 1 lanes 0xffff0000",
            f"""setp.lt.u32 p1, lane, 16; @p1 bra HERE; setp.eq.u32 p2, lane, 16;
            @p2 mbarrier.init.shared::cta.b64 [smem], 1; {WAIT0} HERE: barrier.cluster.arrive; barrier.cluster.wait;""",
        ),
        (pm.ProtocolError, "a second time", f"{RELEASE} {RELEASE}"),
        (pm.ProtocolError, "without barrier.cluster.arrive", ACQUIRE),
        (pm.ProtocolError, "0x0000ffff of a warp", f"setp.gt.u32 p1, lane, 15; @p1 bra L; {RELEASE} L:"),
    ],
)
def test_mistakes_at_a_cluster_barrier(error: type[pm.MachineError], message: str, body: str) -> None:
    """Of warp 1 of each CTA."""
    with pytest.raises(error, match=message):
        run_cluster(f"setp.eq.u32 p0, warp, 0; @p0 bra ON; {body} ON: {RELEASE} {ACQUIRE}", 64)


def test_clusters_that_do_not_fit() -> None:
    for grid, cluster in ((6, 4), (2, 3), (34, 17), (1, 0)):
        with pytest.raises(pm.MachineError, match=f"{cluster} CTAs"):
            run_cluster(PUT, grid=grid, cluster=cluster)
    text = small(PUT.replace("put", "out"), 32).replace("{\n", ".reqnctapercluster 2, 1, 1\n{\n", 1)
    out = np.zeros(1024, np.uint32)
    with pytest.raises(pm.MachineError, match="reqnctapercluster 2"):
        launch(text, {"out": out}, [out.ctypes.data], grid=6, smem=8192)


# ---------------------------------------------------------------------- shared memory of other CTAs of a cluster
# A lane has 16 bytes at r10; those of the next CTA of the cluster are at r12.
FAR = (
    NEIGHBOURS
    + """
    mov.u32 r10, smem; shl.b32 r11, lane, 4; add.u32 r10, r10, r11; mapa.shared::cluster.u32 r12, r10, r5;
    add.u32 r9, r6, 1000; mov.u32 r14, smem; mapa.shared::cluster.u32 r14, r14, r5;
"""
)
STORE, LOAD = "st.shared.v2.b32 [r10+32], {r6, r9};", "ld.shared::cluster.b32 r8, [r12+32];"
BARRIER, RELAXED = f"{RELEASE} {ACQUIRE}", f"barrier.cluster.arrive.relaxed.aligned; {ACQUIRE}"
FAR_READ = f"{STORE} {BARRIER} {LOAD}"
FAR_WRITE, TAKE = "st.shared::cluster.v2.b32 [r12+32], {r6, r9};", "ld.shared.b32 r8, [r10+32];"


def run_far(body: str, threads: int = 32, grid: int = 6, cluster: int = 3, **options: Any) -> np.ndarray:
    return run_small(FAR + body, threads, CLUSTER_REGS, grid=grid, cluster=cluster, **options)


def test_shared_memory_of_other_ctas(tmp_path: Path) -> None:
    """The next CTA's; the own by each of its addresses; of a CTA for each lane; after a second round; and writes."""
    body = f"""
    {STORE} {BARRIER}
    ld.shared::cluster.v2.f32 {{f0, f1}}, [r12+32]; mov.b32 r8, f1; st.global.b32 [put], r8;
    rem.u32 r13, lane, r2; mapa.shared::cluster.u32 r14, r10, r13; ld.shared::cluster.u32 r15, [r14+32];
    mapa.shared::cluster.u32 r14, r10, r1; ld.shared::cluster.b32 r16, [r14+32]; ld.shared::cta.b32 r17, [r14+32];
    ld.shared::cluster.b32 r18, [r10+32]; mapa.shared::cluster.u32 r14, smem, 0; ld.shared::cluster.b32 r19, [r14+36];
    add.u32 r16, r16, r17; add.u32 r16, r16, r18; add.u32 r16, r16, r19;
    {BARRIER} add.u32 r6, r6, 7; {STORE} {BARRIER} {LOAD}
    {BARRIER} mapa.shared::cluster.u32 r14, r10, r1; add.u32 r6, r6, 1; {FAR_WRITE}
    add.u32 r9, r9, 1; st.shared::cluster.b32 [r14+40], r9; {BARRIER}
    {TAKE.replace("r8", "r17")} ld.shared.b32 r18, [r10+40]; add.u32 r16, r16, r17; add.u32 r16, r16, r18;
    add.u32 r13, r5, 1; rem.u32 r13, r13, r2; mapa.shared::cluster.u32 r14, r10, r13;
    ld.shared::cluster.b32 r17, [r14+32]; add.u32 r16, r16, r17;
    add.u32 r15, r15, r16; add.u32 r15, r15, r8; st.global.b32 [put+2048], r15; {BARRIER}
    """
    assemble(small(FAR + body, 32, CLUSTER_REGS), tmp_path / "far.ptx")
    for grid, cluster, options in ((6, 3, {}), (8, 2, {"concurrent": 2}), (4, 1, {}), (6, 3, {"checks": False})):
        for seed in range(3):
            out = run_far(body, grid=grid, cluster=cluster, seed=seed, **options).reshape(32, 32)
            np.testing.assert_array_equal(out[:grid], neighbours(grid, cluster) + 1000)
            cta = np.arange(grid)[:, None]
            first = cta // cluster * cluster
            want = (first + LANE % cluster) * 100 + LANE + 3 * (cta * 100 + LANE) + first * 100 + 1000
            before = (first + (cta - first - 1) % cluster) * 100 + LANE + 8
            want += (
                before + cta * 100 + LANE + 1001 + neighbours(grid, cluster) + 8
            )  # written from there, to others, too
            np.testing.assert_array_equal(out[16 : 16 + grid], want + neighbours(grid, cluster) + 7)


@pytest.mark.parametrize(
    ("error", "message", "body"),
    [
        ((pm.Race, pm.Uninitialised), "rank|which nothing has", STORE + LOAD),
        ((pm.Race, pm.Uninitialised), "rank|which nothing has", f"{RELEASE} {STORE} {ACQUIRE} {LOAD}"),
        (pm.Race, r"read of rank \d .*ordered by barrier.cluster after .* warp 0, line", STORE + RELAXED + LOAD),
        ((pm.Race, pm.Uninitialised), "rank|which nothing has", f"{STORE} {RELEASE} {LOAD} {ACQUIRE} {BARRIER}"),
        (pm.Uninitialised, r"by rank \d .* of smem\+", FAR_READ.replace("r12+32", "r12+2048") + BARRIER),
        (pm.Race, r"not ordered by barrier\.cluster", FAR_READ + STORE + BARRIER),
        (pm.Race, r"write of smem.* after the access by warp 0 of rank", FAR_READ + RELAXED + STORE + BARRIER),
        (pm.MachineError, "the end of the CTA is not ordered|has exited", FAR_READ),
        (pm.MachineError, "the end of the CTA is not ordered|has exited", FAR_READ + RELEASE),
        (pm.ProtocolError, r"the end of the CTA .* the access to smem\+\d+ by warp 0 of rank", FAR_READ + RELAXED),
        (
            pm.MemoryFault,
            r"CTA \([14], 0, 0\), which has exited",
            f"{STORE} {BARRIER} setp.eq.u32 p0, r1, 1; @p0 ret; {BARRIER} {LOAD} {BARRIER}",
        ),
        (pm.MemoryFault, "rank 3 of a cluster of 3", "mapa.shared::cluster.u32 r12, r10, r2;"),
        (pm.MemoryFault, "outside", "mapa.shared::cluster.u32 r12, r0, 0;"),
        (pm.MemoryFault, "outside", FAR_READ.replace("r12+32", "r12+8192") + BARRIER),
        (pm.MemoryFault, "multiple of 4", FAR_READ.replace("r12+32", "r12+33") + BARRIER),
        (pm.MemoryFault, "has 3 CTAs", f"add.u32 r12, r12, 0x4000000; {FAR_READ} {BARRIER}"),
        (pm.MemoryFault, r"smem\+\d+ of rank", FAR_READ.replace("ld.shared::cluster", "ld.shared") + BARRIER),
        (pm.MemoryFault, r"smem\+\d+ of rank", f"{BARRIER} st.shared.b32 [r12], 0; {BARRIER}"),
        (
            pm.Race,
            "read is not ordered after the write of .* warp 0 of rank",
            f"{FAR_WRITE} {RELAXED} {TAKE} {BARRIER}",
        ),
        ((pm.Race, pm.Uninitialised), "rank|which nothing has", f"{FAR_WRITE} {TAKE} {BARRIER}"),
        (pm.Race, "rank .* not ordered after the|not ordered .* rank", f"{STORE} {FAR_WRITE} {BARRIER}"),
        (
            pm.Race,
            r"not ordered after .* rank|by rank \d .* after the read",
            f"{STORE} {BARRIER} {TAKE} {FAR_WRITE} {BARRIER}",
        ),
        (pm.Race, r"write by rank \d .* not ordered after the", f"{STORE} {RELAXED} {FAR_WRITE} {BARRIER}"),
        (pm.Race, "write is not ordered after the write of .* of rank", f"{FAR_WRITE} {RELAXED} {STORE} {BARRIER}"),
        (pm.MachineError, "the end of the CTA is not ordered|has exited", FAR_WRITE),
        (pm.Race, "two lanes write different values", f"{BARRIER} st.shared::cluster.b32 [r14], r6; {BARRIER}"),
    ],
)
def test_mistakes_with_shared_memory_of_other_ctas(error: Any, message: str, body: str) -> None:
    for seed in range(4):
        with pytest.raises(error, match=message) as caught:
            run_far(body, seed=seed)
        assert caught.value.cta is not None


def test_what_a_cta_knows_of_its_copies_others_learn() -> None:
    """A bulk copy that warp 0 has waited for; warp 1 alone orders the CTAs, and reads."""
    copy = """
    setp.eq.u32 p1, r0, 0;
    @p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 128; ld.param.u64 rd3, [p_out];
    @p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [smem+1024], [rd3], 128, [smem];
    setp.ne.u32 p2, warp, 0; @p2 bra ON;
    """
    end = f"""
    ON: bar.sync 0; @!p2 bra ZERO; {BARRIER} mapa.shared::cluster.u32 r12, smem, r5; shl.b32 r11, lane, 2;
    add.u32 r12, r12, r11; ld.shared::cluster.b32 r8, [r12+1024]; st.global.b32 [put+2048], r8; {BARRIER} bra END;
    ZERO: {RELAXED} {RELAXED} END:
    """
    for seed in range(3):
        out = np.arange(1024, dtype=np.uint32)
        text = small(NEIGHBOURS + INIT + copy + WAIT0 + end, 64, CLUSTER_REGS)
        launch(text, {"out": out}, [out.ctypes.data], grid=6, smem=8192, cluster=3, seed=seed)
        np.testing.assert_array_equal(out.reshape(32, 32)[16:22], np.tile(LANE, (6, 1)))
        with pytest.raises(pm.Race, match="rank"):
            run_small(NEIGHBOURS + INIT + copy + end, 64, CLUSTER_REGS, grid=6, cluster=3, seed=seed)


# ---------------------------------------------------------------------- multicast, and mbarriers of other CTAs
# Of two CTAs the first copies 128 bytes of each half of the output's second KiB, in turn, to both; lanes read them.
TWO = (
    NEIGHBOURS
    + """
    setp.ne.u32 p0, r0, 0; @p0 bra INIT;
    mbarrier.init.shared::cta.b64 [smem], 1; mbarrier.init.shared::cta.b64 [smem+8], 2;
    fence.mbarrier_init.release.cluster;
INIT: barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;
    mapa.shared::cluster.u32 r12, smem, r5; mov.u16 both, 3; setp.eq.u32 p1, r0, 0; setp.eq.and.u32 p2, r1, 0, p1;
    ld.param.u64 rd3, [p_out]; shl.b32 r11, lane, 2; mov.u32 r13, smem; add.u32 r11, r11, r13;
"""
)
EXPECT = "@p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem], 128;"
SHARE = """@p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
    [smem+1024], [rd3+{at}], 128, [smem], both;"""
READ = "ld.shared.b32 r8, [r11+1024]; st.global.b32 [put+{at}], r8;"
TELL = "mbarrier.arrive.shared::cluster.b64 _, [r12+8];"
GIVE = f"bar.warp.sync -1; @p1 mbarrier.arrive.shared::cta.b64 _, [smem+8]; @p1 {TELL}"


def wait(barrier: str, parity: int) -> str:
    return (
        f"{{ .reg .pred done; W: mbarrier.try_wait.parity.shared::cta.b64 done, [{barrier}], {parity}; @!done bra W; }}"
    )


FIRST = f"{EXPECT} {SHARE.format(at=1024)} {wait('smem', 0)} {READ.format(at=0)}"
SECOND = f"{EXPECT} {SHARE.format(at=1152)} {wait('smem', 1)} {READ.format(at=2048)}"
FREE, LEFT = wait("smem+8", 0), f"{GIVE} {wait('smem+8', 1)}"


def run_two(body: str, tmp_path: Path | None = None, **options: Any) -> np.ndarray:
    out = np.arange(1024, dtype=np.uint32)
    text = small(TWO + body, 32, CLUSTER_REGS + " .reg .b16 both;")
    if tmp_path is not None:
        assemble(text, tmp_path / "two.ptx")
    launch(text, {"out": out}, [out.ctypes.data], grid=2, smem=8192, cluster=2, **options)
    return out.reshape(32, 32)


def test_a_copy_to_the_ctas_of_a_cluster(tmp_path: Path) -> None:
    """A buffer is filled anew once both have said, each at the other's mbarrier too, that they have read it."""
    for seed in range(6):
        out = run_two(f"{FIRST} {GIVE} {FREE} {SECOND} {LEFT}", tmp_path if not seed else None, seed=seed)
        np.testing.assert_array_equal(out[:2], np.tile(256 + LANE, (2, 1)))
        np.testing.assert_array_equal(out[16:18], np.tile(288 + LANE, (2, 1)))


@pytest.mark.parametrize(
    ("error", "message", "body"),
    [
        (pm.Race, "asynchronous copy", f"{FIRST} {GIVE} {SECOND} {LEFT}"),
        (pm.Deadlock, "phase 2, arrivals outstanding 2 of 2", f"{FIRST} {GIVE} {GIVE} {FREE}"),
        (pm.Deadlock, "arrivals outstanding 1 of 2", FIRST + GIVE.replace(f"@p1 {TELL}", f"@p2 {TELL}") + FREE),
        (
            (pm.Race, pm.Uninitialised), "while an asynchronous copy writes it|nothing has written",
            FIRST.replace(wait("smem", 0), ""),
        ),
        (pm.MachineError, "128 bytes more|asynchronous copy", FIRST.replace("@p2 cp", "@p1 cp")),
        (pm.MemoryFault, "0b101 of a cluster of 2", f"mov.u16 both, 5; {FIRST}"),
        (
            pm.MemoryFault, "has exited",
            f"""{FIRST} setp.eq.u32 p3, r1, 1; @p3 ret; mov.u32 r14, 0; L: add.u32 r14, r14, 1;
            setp.lt.u32 p3, r14, 2000; @p3 bra L; {GIVE} {FREE}""",
        ),
    ],
)  # fmt: skip
def test_mistakes_with_what_ctas_share(error: Any, message: str, body: str) -> None:
    with pytest.raises(error, match=message):
        assert [run_two(body, seed=seed) for seed in range(6)]


@pytest.mark.parametrize("without", ["fence.mbarrier_init.release.cluster;", "barrier.cluster.wait.acquire;"])
def test_mbarriers_of_others_are_announced(without: str) -> None:
    text = small((TWO + FIRST).replace(without, "", 1), 32, CLUSTER_REGS + " .reg .b16 both;")
    out = np.arange(1024, dtype=np.uint32)
    with pytest.raises(pm.ProtocolError, match=r"fence\.mbarrier_init"):
        launch(text, {"out": out}, [out.ctypes.data], grid=2, smem=8192, cluster=2)


# ---------------------------------------------------------------------- grids that overlap
WRITTEN, OTHERS = frozenset({"out"}), frozenset({"partials"})


@pytest.mark.parametrize(
    ("body", "dependent", "noticed"),
    [
        ("griddepcontrol.wait; st.global.b32 [out], r0;", None, ""),
        ("griddepcontrol.wait; griddepcontrol.launch_dependents; st.global.b32 [out], r0;", None, ""),
        ("griddepcontrol.launch_dependents; griddepcontrol.wait; st.global.b32 [out], r0;", WRITTEN, ""),
        ("st.global.b32 [out], r0; griddepcontrol.wait;", None, r"out is used before griddepcontrol\.wait"),
        ("ld.relaxed.gpu.global.b32 r1, [out];", WRITTEN, r"out is used before griddepcontrol\.wait"),
        ("ld.global.nc.b32 r1, [out]; griddepcontrol.wait;", OTHERS, r"a weak read before griddepcontrol\.wait"),
        (
            "setp.eq.u32 p0, r0, 0; @p0 griddepcontrol.wait; bar.sync 0; ld.global.b32 r1, [out];",
            None,
            "is used before",
        ),
        ("griddepcontrol.launch_dependents; griddepcontrol.wait;", None, r"launch_dependents before \.wait"),
        ("mov.u32 r1, 0;", None, "may end before the one before it"),
    ],
)
def test_what_comes_before_in_the_stream_is_waited_for(
    body: str, dependent: frozenset[str] | None, noticed: str
) -> None:
    if not noticed:
        np.testing.assert_array_equal(run_small(body, dependent=dependent)[:32], LANE)
        return
    with pytest.raises(pm.MachineError, match=noticed):
        run_small(body, dependent=dependent)


def test_what_is_read_before_may_be_anything() -> None:
    """By strong reads; by half of them what will be there."""
    seen = set()
    for seed in range(8):
        body = "ld.relaxed.gpu.global.b32 r1, [out]; griddepcontrol.wait; st.global.b32 [out], r1;"
        seen |= set(run_small(body, dependent=None, seed=seed)[:32].tolist())
    assert 0 in seen
    assert len(seen) > 32


# ---------------------------------------------------------------------- bulk copies out of shared memory
# A lane has 16 bytes at r10; rd2 is the output, rd3 the lane's 16 bytes of it.
LEAVE = """
    mov.u32 r10, smem; shl.b32 r11, r0, 4; add.u32 r10, r10, r11; ld.param.u64 rd2, [p_out]; mul.wide.u32 rd3, r0, 16;
    add.s64 rd3, rd3, rd2; setp.eq.u32 p0, r0, 0; setp.eq.u32 p1, r0, 1; add.u32 r1, r0, 100;
"""
FILL = "st.shared.v4.b32 [r10], {r0, r1, r0, r1};"
FENCE = "fence.proxy.async.shared::cta; bar.sync 0;"
OUT = "@p0 cp.async.bulk.global.shared::cta.bulk_group [rd2], [r10], 512;"
COMMIT, WAIT = "@p0 cp.async.bulk.commit_group;", "@p0 cp.async.bulk.wait_group 0;"
READ = "@p0 cp.async.bulk.wait_group.read 0;"
FILLED = np.stack([LANE, LANE + 100, LANE, LANE + 100], axis=1)


@pytest.mark.parametrize("wait", [WAIT, READ, READ + WAIT])
def test_bulk_copies_out_of_shared_memory(wait: str, tmp_path: Path) -> None:
    """One by thread 0, whose source is written again after the wait; a size in a register is as good."""
    body = f"{LEAVE} {FILL} {FENCE} {OUT} {COMMIT} {wait} bar.sync 0; add.u32 r0, r0, 1; {FILL}"
    assemble(small(body), tmp_path / "out.ptx")
    for seed in range(4):
        for text in (body, "mov.u32 r9, 512;" + body.replace("512;", "r9;")):
            np.testing.assert_array_equal(run_small(text, seed=seed)[:128].reshape(32, 4), FILLED)


def test_groups_of_bulk_copies() -> None:
    """Each thread has its own: a copy of each, then two groups of thread 0, of which the first must have ended."""
    each = "cp.async.bulk.global.shared::cta.bulk_group [rd3], [r10], 16; cp.async.bulk.commit_group;"
    body = f"{LEAVE} {FILL} {FENCE} {each} cp.async.bulk.wait_group 0; ld.global.v2.b32 {{r4, r5}}, [rd3];"
    two = f"""
    add.s64 rd4, rd2, 1024; @p0 cp.async.bulk.global.shared::cta.bulk_group [rd4], [r10], 256; {COMMIT}
    @p0 cp.async.bulk.global.shared::cta.bulk_group [rd4+256], [r10+256], 256; {COMMIT}
    @p0 cp.async.bulk.wait_group 1; @p0 st.shared.b32 [r10+16], 7; {WAIT}
    setp.lt.u32 p2, r0, 16; add.u32 r4, r4, r5; @!p2 st.shared.v4.b32 [r10], {{r4, r4, r4, r4}};
    st.global.b32 [out+2048], r4;
    """
    for seed in range(4):
        out = run_small(body + two, seed=seed)
        for start in (0, 256):
            np.testing.assert_array_equal(out[start : start + 128].reshape(32, 4), FILLED)
        np.testing.assert_array_equal(out[512:544], 2 * LANE + 100)
    with pytest.raises(pm.Race, match=r"write of smem\+16 while a bulk copy reads it"):
        run_small((body + two).replace("wait_group 1", "wait_group 2"))


def test_a_bulk_copy_out_ends_at_any_time() -> None:
    body = f"{LEAVE} {FILL} {FENCE} {OUT} {COMMIT} add.u32 r0, r0, 1; {'add.u32 r2, r0, r0;' * 50} {FILL} {WAIT}"
    first = {int(run_small(body, checks=False, seed=seed)[0]) for seed in range(20)}
    assert first == {0, 1}


@pytest.mark.parametrize(
    ("error", "message", "threads", "body"),
    [
        (pm.Race, "bulk copy's read without fence.proxy.async", 32, f"{FILL} bar.sync 0; {OUT} {COMMIT} {WAIT}"),
        (pm.Race, "without fence.proxy.async", 32, f"{FENCE} {FILL} bar.sync 0; {OUT} {COMMIT} {WAIT}"),
        (pm.Race, "without fence.proxy.async", 32, f"{FILL} @p0 fence.proxy.async; {OUT} {COMMIT} {WAIT}"),
        (
            pm.Race,
            "without fence.proxy.async",
            64,
            f"{FILL} bar.sync 0; fence.proxy.async; {OUT.replace('512', '1024')} {COMMIT} {WAIT}",
        ),
        (pm.MachineError, "bulk copy's read", 64, f"{FILL} fence.proxy.async; {OUT.replace('512', '1024')} {COMMIT}"),
        (pm.Uninitialised, "bulk copy's read", 32, OUT),
        (pm.Race, "while a bulk copy reads it", 32, f"{FILL} {FENCE} {OUT} {COMMIT} {FILL} {WAIT}"),
        (pm.Race, "while a bulk copy reads it", 32, f"{FILL} {FENCE} {OUT} {WAIT} {FILL}"),
        (
            pm.Race,
            "while a bulk copy reads it",
            64,
            f"""{FILL} {FENCE} {OUT} {COMMIT} bar.sync 0; setp.eq.u32 p2, r0, 32;
            @p2 st.shared.b32 [smem], 0; bar.sync 0;""",
        ),
        (
            pm.Race,
            "not ordered after the (read|write)",
            64,
            f"{FILL} {FENCE} {OUT} {COMMIT} {WAIT} @!p0 st.shared.b32 [smem], 0;",
        ),
        (pm.ProtocolError, "was not committed: line", 32, f"{FILL} {FENCE} {OUT}"),
        (pm.ProtocolError, "was not committed: line", 32, f"{FILL} {FENCE} {OUT} {WAIT}"),
        (pm.ProtocolError, "was not waited for: line", 32, f"{FILL} {FENCE} {OUT} {COMMIT}"),
        (pm.ProtocolError, "was not waited for", 32, f"{FILL} {FENCE} {OUT} {COMMIT} {WAIT.replace(' 0', ' 1')}"),
        (pm.ProtocolError, "was not waited for", 32, f"{FILL} {FENCE} {OUT} {COMMIT} {WAIT.replace('p0', 'p1')}"),
        (pm.ProtocolError, "was not committed", 32, f"{FILL} {FENCE} {OUT} {COMMIT.replace('p0', 'p1')} {WAIT}"),
        (pm.MemoryFault, "multiples of 16", 32, f"{FILL} {FENCE} {OUT.replace('512', '500')}"),
        (pm.MemoryFault, "multiples of 16", 32, f"{FILL} {FENCE} {OUT.replace('512', '0')}"),
        (pm.MemoryFault, "multiples of 16", 32, f"{FILL} {FENCE} {OUT.replace('rd2', 'rd2+8')}"),
        (pm.MemoryFault, "not a multiple of 16", 32, f"{FILL} {FENCE} {OUT.replace('r10', 'r10+8')}"),
        (pm.MemoryFault, "over its end", 32, f"{FILL} {FENCE} {OUT.replace('rd2', 'rd2+3840')}"),
        (pm.MemoryFault, "outside the 8192", 32, f"{FILL} {FENCE} {OUT.replace('r10', 'r10+8000')}"),
    ],
)
def test_mistakes_with_bulk_copies_out(error: type[pm.MachineError], message: str, threads: int, body: str) -> None:
    for seed in range(3):
        with pytest.raises(error, match=message) as caught:
            run_small(LEAVE + body, threads, seed=seed)
        assert caught.value.text


def test_a_bulk_copy_to_a_read_only_buffer() -> None:
    array = np.zeros(1024, np.uint32)
    with pytest.raises(pm.MemoryFault, match="read-only"):
        launch(small(f"{LEAVE} {FILL} {FENCE} {OUT}"), {"in": array}, [array.ctypes.data], smem=8192)


def test_other_ctas_see_a_bulk_copy_that_was_waited_for() -> None:
    copy = f"""
    mov.u32 r10, smem; shl.b32 r11, lane, 2; add.u32 r11, r10, r11; st.shared.b32 [r11], r6; {FENCE}
    setp.eq.u32 p0, r0, 0; @p0 cp.async.bulk.global.shared::cta.bulk_group [put], [r10], 128; {COMMIT}
    """
    body = f"{copy} {WAIT} {BARRIER} {GET} st.global.b32 [put+2048], r7;"
    for seed in range(3):
        np.testing.assert_array_equal(run_cluster(body, seed=seed).reshape(32, 32)[16:22], neighbours(6, 3))
        with pytest.raises(pm.Race, match=r"read of out.* not ordered .* cp\.async\.bulk"):
            run_cluster(body.replace(WAIT, READ), seed=seed)
        with pytest.raises(pm.Race, match=r"ordered by barrier\.cluster"):
            run_cluster(f"{copy} {WAIT} {GET}", seed=seed)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.u32 r1, r0;", "not modelled"),
        ("mapa.shared::cluster.u64 rd1, rd2, 0;", "type of mapa"),
        ("mapa.u32 r1, r2, 0;", "shared::cluster"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [rd1], [r1], 16;", "reduce|not modelled"),
        ("cp.async.bulk.global.shared::cluster.bulk_group [rd1], [r1], 16;", "only bulk copies"),
        ("add.cc.u32 r1, r0, r0;", "cc"),
        ("add.u32 r1, r0, nothing;", "not declared"),
        ("add.u32 rd1, r0, r0;", "64 bits"),
        ("bra NOWHERE;", "no label"),
        ("ld.shared.b32 r1, [smem], 3;", "operands"),
    ],
)
def test_unknown_text(body: str, message: str) -> None:
    with pytest.raises(pm.PtxError, match=message) as caught:
        pm.parse(small(body))
    assert body.split()[0] in str(caught.value)


# ---------------------------------------------------------------------- TMA, mbarriers, wgmma
BOX = 8192
BARS = 19 * BOX  # Q, K, P, then full Q, full K, empty K


def gemm_text(a_registers: bool = False) -> str:
    """O[64, 256] = sum over tiles of bf16(Q Kᵀ) K[:, :256]: warp 4 loads, warps 0 to 3 multiply."""

    def wait(barrier: int, parity: str) -> str:
        return (
            "{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, "
            f"[smem+{BARS + 8 * barrier}], {parity}; @done bra DONE; bra WAIT; DONE: }}"
        )

    def tma(box: int, name: str, x: str, y: str, barrier: int) -> str:
        return (
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            f"[smem+{box * BOX}], [{name}, {{{x}, {y}}}], [smem+{BARS + 8 * barrier}], policy;"
        )

    def vector(prefix: str, first: int, count: int) -> str:
        return "{" + ", ".join(f"{prefix}{i}" for i in range(first, first + count)) + "}"

    load_q = "\n".join(f"mov.b32 x, {64 * c}; {tma(c, 'tq', 'x', '0', 0)}" for c in range(9))
    load_k = "\n".join(f"mov.b32 x, {64 * c}; {tma(9 + c, 'tk', 'x', 'y', 1)}" for c in range(9))
    qk = "\n".join(
        f"add.s64 da, base, {(c * BOX + 32 * k) // 16}; add.s64 db, base, {((9 + c) * BOX + 32 * k) // 16};\n"
        f"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {vector('s', 0, 32)}, da, db, "
        f"{'1' if c or k else '0'}, 1, 1, 0, 0;"
        for c in range(9)
        for k in range(4)
    )
    pack = "\n".join(f"cvt.rn.bf16x2.f32 pk{i}, s{2 * i + 1}, s{2 * i};" for i in range(16))
    store = "\n".join(
        f"xor.b32 x, st, {32 * k}; stmatrix.sync.aligned.m8n8.x4.shared.b16 [x], {vector('pk', 4 * k, 4)};"
        for k in range(4)
    )
    pv = "\n".join(
        f"add.s64 da, base, {(18 * BOX + 32 * k) // 16}; add.s64 db, mn, {(9 * BOX + 2048 * k) // 16};\n"
        f"wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {vector('o', 0, 128)}, "
        + (f"{vector('pk', 4 * k, 4)}, db, 1, 1, 1, 1;" if a_registers else "da, db, 1, 1, 1, 0, 1;")
        for k in range(4)
    )
    end = "\n".join(
        f"st.global.v2.f32 [at+{32 * i}], {vector('o', 4 * i, 2)}; "
        f"st.global.v2.f32 [at+{32 * i + 8192}], {vector('o', 4 * i + 2, 2)};"
        for i in range(32)
    )
    return f"""{HEAD}{SMEM}
.visible .entry gemm(.param .align 64 .b8 p_q[128], .param .align 64 .b8 p_k[128], .param .u64 p_out, .param .u32 p_n)
.reqntid 160, 1, 1
{{
    .reg .b32 tid, lane, warp, x, y, n, j, ph, st, t<4>; .reg .pred p, lead;
    .reg .b64 tq, tk, policy, base, mn, da, db, at, w; .reg .f32 s<32>, o<128>; .reg .b32 pk<16>;
    mov.u32 tid, %tid.x; and.b32 lane, tid, 31; shr.u32 warp, tid, 5; setp.eq.u32 lead, lane, 0;
    ld.param.u32 n, [p_n]; mov.b32 j, 0;
    setp.ne.u32 p, tid, 0; @p bra READY;
    mbarrier.init.shared::cta.b64 [smem+{BARS}], 1;
    mbarrier.init.shared::cta.b64 [smem+{BARS + 8}], 1;
    mbarrier.init.shared::cta.b64 [smem+{BARS + 16}], 4;
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
    setp.lt.u32 p, warp, 4; @p bra CONSUMER;
    elect.sync _|p, -1; @!p bra EXIT;
    mov.b64 tq, p_q; cvta.param.u64 tq, tq; mov.b64 tk, p_k; cvta.param.u64 tk, tk;
    prefetch.tensormap [tk];
    createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+{BARS}], {9 * BOX};
    {load_q}
FEED:
    and.b32 ph, j, 1; xor.b32 ph, ph, 1; shl.b32 y, j, 6;
    /* empty */ {wait(2, "ph")}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [smem+{BARS + 8}], {9 * BOX};
    {load_k}
    add.u32 j, j, 1; setp.lt.u32 p, j, n; @p bra FEED;
    bra EXIT;
CONSUMER:
    mov.u32 x, smem; and.b32 x, x, 0x3ffff; shr.u32 x, x, 4; cvt.u64.u32 base, x;
    or.b64 mn, base, {hex((1 << 62) | (64 << 32) | ((BOX // 16) << 16))};
    or.b64 base, base, {hex((1 << 62) | (64 << 32) | (1 << 16))};
    // row 16 warp + lane % 16, chunk (lane / 16) ^ (row & 7)
    and.b32 t0, lane, 15; mad.lo.u32 t0, warp, 16, t0; shl.b32 t0, t0, 7;
    shr.u32 t1, lane, 4; and.b32 t2, lane, 7; xor.b32 t1, t1, t2; shl.b32 t1, t1, 4; add.u32 st, t0, t1;
    mov.u32 t0, smem; add.u32 st, st, t0; add.u32 st, st, {18 * BOX};
    {" ".join(f"mov.f32 o{i}, 0f00000000;" for i in range(128))}
    /* full Q */ {wait(0, "0")}
LOOP:
    and.b32 ph, j, 1;
    /* full K */ {wait(1, "ph")}
    wgmma.fence.sync.aligned; // QK
    {qk}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0; // S
    {pack}
    bar.sync 1, 128;
    {store}
    fence.proxy.async.shared::cta;
    bar.sync 1, 128;
    wgmma.fence.sync.aligned; // PV
    {pv}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0; // O
    @lead mbarrier.arrive.shared::cta.b64 _, [smem+{BARS + 16}];
    add.u32 j, j, 1; setp.lt.u32 p, j, n; @p bra LOOP;
    ld.param.u64 at, [p_out];
    shr.u32 t0, lane, 2; mad.lo.u32 t0, warp, 16, t0; shl.b32 t0, t0, 8;
    and.b32 t1, lane, 3; shl.b32 t1, t1, 1; add.u32 t0, t0, t1; mul.wide.u32 w, t0, 4; add.s64 at, at, w;
    {end}
EXIT:
    ret;
}}
"""


def gemm(text: str, tiles: int = 3, rows: int | None = None, **options: Any) -> tuple[float, pm.Statistics]:
    """(relative error, statistics)."""
    rng = np.random.default_rng(7)
    q = bf16(rng.standard_normal((64, 576)) / 24)
    k = bf16(rng.standard_normal((rows or 64 * tiles, 576)))
    out = np.full((64, 256), np.nan, np.float32)
    maps = [pm.TensorMap(a.ctypes.data, a.shape[0], 576, 1152, 2, 64, 64) for a in (q, k)]
    statistics = launch(text, {"q": q, "k": k, "out": out}, [*maps, out.ctypes.data, tiles], smem=BARS + 24, **options)
    p = wide(bf16(wide(q) @ wide(k).T))
    want = p @ wide(k)[:, :256]
    return float(np.abs(out - want).max() / np.abs(want).max()), statistics


@pytest.mark.parametrize("a_registers", [False, True])
def test_gemm(a_registers: bool) -> None:
    text = gemm_text(a_registers)
    for seed in range(3):
        error, statistics = gemm(text, seed=seed)
        assert error < 2e-3  # one bf16 of P may round the other way
    assert statistics.wgmmas == 3 * 40
    assert statistics.flops == 3 * 2 * 64 * 64 * (576 + 256)
    assert statistics.tma_bytes == statistics.global_read == 4 * 9 * BOX
    assert statistics.global_written == 64 * 256 * 4
    assert statistics.ways("stmatrix.sync.aligned.m8n8.x4.shared.b16") == 1


def test_rows_outside_a_tensor_are_zero() -> None:
    error, statistics = gemm(gemm_text(), tiles=2, rows=100)
    assert error < 2e-3
    assert statistics.global_read == (64 + 100) * 1152
    assert gemm(gemm_text(), tiles=2, rows=100, checks=False)[0] < 2e-3


def test_of_a_whole_tensor_rows_outside_are_a_fault() -> None:
    data = np.arange(100 * 128, dtype=np.uint8).reshape(100, 128)
    memory = pm.Memory()
    memory.add("data", data.ctypes.data, data.nbytes)
    boxes = pm.TensorMap(data.ctypes.data, 100, 64, 128, 2, 16, 64, whole=True)
    np.testing.assert_array_equal(boxes.box(memory, 0, 84)[0], data[84:])
    for y in (-1, 85, 2**31 - 1):
        with pytest.raises(pm.MemoryFault, match="of a tensor of 100"):
            boxes.box(memory, 0, y)


def test_gemm_assembles(tmp_path: Path) -> None:
    assemble(gemm_text(), tmp_path / "gemm.ptx")


TRY = "mbarrier.try_wait.parity.shared::cta.b64 done,"
PLANTED: dict[str, tuple[type[pm.MachineError], str, str, str]] = {
    "no proxy fence": (pm.Race, "fence.proxy.async", "fence.proxy.async.shared::cta;", ""),
    "fence after the barrier": (
        pm.Race,
        "fence.proxy.async",
        "fence.proxy.async.shared::cta;\n    bar.sync 1, 128;",
        "bar.sync 1, 128; fence.proxy.async.shared::cta;",
    ),
    "fence by one lane": (
        pm.Race,
        "fence.proxy.async",
        "fence.proxy.async.shared::cta;",
        "@lead fence.proxy.async.shared::cta;",
    ),
    "no barrier after P": (pm.MachineError, "wgmma's read", "cta;\n    bar.sync 1, 128;", "cta;"),
    "no wait for the empty buffer": (pm.MachineError, "smem", f"{TRY} [smem+155664], ph;", "setp.eq.u32 done, 0, 0;"),
    "no wait for the full buffer": (pm.MachineError, "smem", f"{TRY} [smem+155656], ph;", "setp.eq.u32 done, 0, 0;"),
    "one look at the full buffer": (
        pm.MachineError,
        "smem",
        "[smem+155656], ph; @done bra DONE; bra WAIT;",
        "[smem+155656], ph;",
    ),
    "too many bytes expected": (pm.Deadlock, "bytes outstanding", "[smem+155656], 73728", "[smem+155656], 73744"),
    "too few bytes expected": (pm.ProtocolError, "16 bytes more", "[smem+155656], 73728", "[smem+155656], 73712"),
    "accumulators before the wait": (pm.Race, "s1 is read", "wgmma.wait_group.sync.aligned 0; // S", ""),
    "buffer released before the wait": (pm.Race, "wgmma", "wgmma.wait_group.sync.aligned 0; // O", ""),
    "no wgmma.fence": (pm.ProtocolError, "wgmma.fence", "wgmma.fence.sync.aligned; // QK", ""),
    "no commit": (pm.MachineError, "wgmma", "wgmma.commit_group.sync.aligned;", ""),
    "overlapping boxes": (pm.Race, "asynchronous copy", "[smem+81920], [tk", "[smem+73728], [tk"),
    "one arrival too few": (pm.Deadlock, "arrivals outstanding 1 of 5", "[smem+155664], 4", "[smem+155664], 5"),
    "one arrival too many": (pm.MachineError, "smem", "[smem+155664], 4", "[smem+155664], 3"),
    "barriers not fenced": (pm.ProtocolError, "fence.mbarrier_init", "fence.mbarrier_init.release.cluster;", ""),
    "descriptor off its row": (pm.ProtocolError, "k step", "add.s64 da, base, 6;", "add.s64 da, base, 7;"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str) -> None:
    error, message, old, new = PLANTED[name]
    text = gemm_text()
    assert old in text

    def seeds() -> None:
        for seed in range(10 if name.startswith("one look") else 1):  # only a wait that gives up shows that one
            gemm(text.replace(old, new), seed=seed)

    with pytest.raises(error, match=message):
        seeds()


def test_no_wgmma_fence_after_a_was_written() -> None:
    text = gemm_text(a_registers=True)
    with pytest.raises(pm.ProtocolError, match="A register pk0"):
        gemm(text.replace("wgmma.fence.sync.aligned; // PV", ""))


def test_wrong_register_of_a() -> None:
    """A registers of a wgmma in flight are written."""
    text = gemm_text(a_registers=True)
    old = "wgmma.wait_group.sync.aligned 0; // O"
    assert old in text
    with pytest.raises(pm.Race, match="pk3 is written"):
        gemm(text.replace(old, f"mov.b32 pk3, 0; {old}"))


def test_fp8_wgmma() -> None:
    """64 x 8 x 32 of e4m3: A and B by st.shared, K-major without swizzle; all ones but one row of A."""
    body = """
    shl.b32 r1, r0, 4; mov.u32 r2, smem; add.u32 r1, r1, r2;
    mov.b32 r4, 0x38383838; setp.eq.u32 p1, r0, 3; @p1 mov.b32 r4, 0x40404040;
    st.shared.v4.b32 [r1], {r4, r4, r4, r4};
    mov.b32 r4, 0x38383838; setp.lt.u32 p1, r0, 16; @p1 st.shared.v4.b32 [r1+2048], {r4, r4, r4, r4};
    fence.proxy.async; bar.sync 0;
    shr.u32 r5, r2, 4; cvt.u64.u32 rd1, r5; or.b64 rd1, rd1, 0x1000080000; add.s64 rd2, rd1, 128;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {f0, f1, f2, f3}, rd1, rd2, 0, 1, 1;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    st.global.f32 [out], f0;
    """
    out = run_small(body, 128).view(np.float32)[:128].reshape(4, 8, 4)  # warp, row, lane of a row
    want = np.full((4, 8, 4), 32, np.float32)
    want[0, 3] = 48  # row 3, k 0 to 15 are 2
    np.testing.assert_array_equal(out, want)
