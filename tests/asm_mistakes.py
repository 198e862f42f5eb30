"""Mistakes in the PTX templates that the emulated cases must notice: by name (file, what stands there, instead)."""

import contextlib
import json
from collections.abc import Iterator

from mla_jit.compile import render


class Stale(Exception):
    """The template no longer has the text that a mistake replaces."""


@contextlib.contextmanager
def planted(file: str, old: str, new: str) -> Iterator[None]:
    """Another text in every template that is read meanwhile and has the file."""
    true = render.closure

    def closure(isa: str, template: str) -> str:
        files = json.loads(true(isa, template))
        for entry in files:
            if entry[0] == file:
                if old not in entry[1]:
                    raise Stale(f"{file} has no {old!r}")
                entry[1] = entry[1].replace(old, new)
        return json.dumps(files)

    render.closure = closure  # type: ignore[assignment]
    try:
        yield
    finally:
        render.closure = true


_FENCED = "{{ m.fence_async() }}\n"
_PUBLISH = "    {{ m.bar_arrive(1 + b, 256) }}"
_P_THERE = "        {{ m.bar_sync('ours', 128) }}                  // P is there"
_OTHERS = "ld.shared.v2.f32 {f2, f3}, [{{ place }}+{{ SUMS + 32 * i + 4 * N * other }}];\n"

_FIRST = "barrier.cluster.arrive.release.aligned;\n        {{ m.ceil_div"
_LAST = "        barrier.cluster.arrive.release.aligned;\n        barrier.cluster.wait.acquire.aligned;\n    }"

CHANGES: dict[str, dict[str, object]] = {
    "walk: ": {"walk": True, "together": False},
    "even: ": {"walk": False, "together": False, "multicast": False},
    "even, tiles of 32: ": {"walk": False, "together": False, "multicast": False, "block_n": 32},
    "short: ": {"short": 256, "short_m": 8, "middle": 0},
    "middle: ": {"short": 256, "short_m": 8, "middle": 512},
    "multicast: ": {"multicast": True, "together": False},
    "multicast, persistent: ": {"multicast": True},
    "combine, many: ": {"min_tiles": 1, "together": False, "walk": False, "combine_h": 4},
    "combine, by lengths: ": {"num_kv_splits": 4, "min_tiles": 1, "together": False, "walk": False},
}  # by how a mistake's name begins, the tunables that reach it
PAGES = {"in parts: ": 48, "gathered: ": 7}  # by how its name begins, the page size of the only cases that reach it
# By how a mistake's name begins, into how many pieces sequences are cut to reach it.
PIECES = {"together: ": 2, "sent: ": 2, "combine: ": 4, "combine, many: ": 11}
TOGETHER: dict[str, tuple[str, str, str]] = {
    "together: pieces not released": ("together.ptx", _FIRST, _FIRST.replace("release", "relaxed")),
    "together: gone too early": ("together.ptx", _LAST, "    }"),
    "together: reads not released": ("together.ptx", _LAST, _LAST.replace("release", "relaxed")),
    "together: all take the first rows": ("together.ptx", "mul.lo.s32 start, split, share;", "mov.u32 start, 0;"),
    "together: a piece twice": ("together.ptx", "smem, {{ s }};", "smem, 0;"),
    "together: another's LSE": (
        "together.ptx",
        "add.u32 row, peer{{ s }}, e;",
        "add.u32 row, peer{{ SPLITS - 1 - s }}, e;",
    ),
}
_RELAXED = "        barrier.cluster.arrive.relaxed.aligned;\n"
_WAITED = "        barrier.cluster.wait.acquire.aligned;\n"
_SENT = f"{_RELAXED.replace('relaxed', 'release')}{_WAITED}        bra EXIT;\n"
SENT: dict[str, tuple[str, str, str]] = {
    "sent: over buffers in use": (
        "wide.ptx",
        "barrier.cluster.arrive.release.aligned;   // here",
        "barrier.cluster.arrive.relaxed.aligned;   // here",
    ),
    "sent: not released": ("wide.ptx", _SENT, f"{_RELAXED}{_WAITED}        bra EXIT;\n"),
    "sent: not waited for": ("wide.ptx", _RELAXED + _WAITED, _RELAXED),
    "sent: where results go": ("wide.ptx", "SENT_AT = K[0] + BOXES * BOX", "SENT_AT = K[0]"),
    "sent: the sums as they are": (
        "wide.ptx",
        "l{{ r }}, f{{ 6 + r }}, f{{ 2 + r }}, l{{ r }};",
        "l{{ r }}, f{{ 6 + r }}, 0f3F800000, l{{ r }};",
    ),
    "sent: O as it is": ("wide.ptx", "s{{ e }}, f{{ 2 + e // 2 % 2 }}, o", "s{{ e }}, 0f3F800000, o"),
    "sent: one's own O as it is": (
        "wide.ptx",
        "o{{ 4 * i + e }}, o{{ 4 * i + e }}, f{{ e // 2 % 2 }};",
        "o{{ 4 * i + e }}, o{{ 4 * i + e }}, 0f3F800000;",
    ),
    "sent: to oneself": ("wide.ptx", "xor.b32 t1, split, 1;", "mov.b32 t1, split;"),
}
_WAIT, _NEXT = "    griddepcontrol.wait;\n", "    griddepcontrol.launch_dependents;\n"
OVERLAP: dict[str, tuple[str, str, str]] = {
    "begun before others have ended": ("macros.ptx", _WAIT + _NEXT, _NEXT),
    "others begun before it has waited": ("macros.ptx", _WAIT + _NEXT, _NEXT + _WAIT),
}
AHEAD: dict[str, tuple[str, str, str]] = {
    "ahead: weak reads": ("ahead.ptx", "{{ text | replace('ld.global.nc', 'ld.relaxed.gpu.global') }}", "{{ text }}"),
    "ahead: a page id as a row": ("ahead.ptx", "mad.lo.u32 token, page, {{ PAGE }}, token;", "mov.u32 token, page;"),
    "ahead: a weak word": (
        "ahead.ptx",
        "@lead st.relaxed.cta.shared.b32 [smem+{{ ASKS }}], 0;",
        "@lead st.shared.b32 [smem+{{ ASKS }}], 0;",
    ),
    "ahead: a barrier of all": ("ahead.ptx", "    {{ m.bar_sync(0, threads) }}", "    bar.sync 0;"),
}
ROWS: dict[str, tuple[str, str, str]] = {
    "rows: the first again": ("pieces.ptx", "mul.lo.s64 {{ step }}, per_head, {{ heads }};", "mov.b64 {{ step }}, 0;"),
    "rows: of another part of the block": (
        "pieces.ptx",
        "mad.lo.s64 {{ dst }}, {{ dst }}, per_head, goal;",
        "mov.b64 {{ dst }}, goal;",
    ),
}
MULTICAST: dict[str, tuple[str, str, str]] = {
    "multicast: the other's arrivals not counted": ("wide.ptx", "8 if MULTICAST else 4", "4"),
    "multicast: the other is not told": (
        "wide.ptx",
        "{% if MULTICAST %}\n    {{ m.mbar_arrive_there",
        "{% if false %}\n    {{ m.mbar_arrive_there",
    ),
    "multicast: gone before the other has arrived": (
        "wide.ptx",
        "{% set FED_ALL = 'FED' if MULTICAST else 'EXIT' %}",
        "{% set FED_ALL = 'EXIT' %}",
    ),
    "multicast: the other's barriers not there": ("macros.ptx", "    barrier.cluster.wait.acquire;\n", ""),
    "multicast: each box twice": ("wide.ptx", "('both', '@ours%d' % (i % 2))", "('both', '')"),
    "multicast: half the boxes": ("wide.ptx", "mov.b16 both, 3;", "mov.b16 both, 1;"),
    "multicast: an odd tile is kept": (
        "wide.ptx",
        "{% if LOOP or MULTICAST %}\n        {{ release(0, 1) }}",
        "{% if LOOP %}\n        {{ release(0, 1) }}",
    ),
}
MULTICAST_LOOP = {
    name.replace(":", ", persistent:"): mistake for name, mistake in MULTICAST.items() if "odd tile" not in name
}
PARTS: dict[str, tuple[str, str, str]] = {
    "in parts: pages beyond the end": ("copied.ptx", "    min.s32 t0, t0, t1;\n", ""),
    "in parts: one page for all": ("copied.ptx", "}}, part;\n    sub.s32 t1", "}}, 0;\n    sub.s32 t1"),
    "in parts: the start of a page": ("copied.ptx", "{{ m.remainder('t0', 't0', PAGE) }}", "mov.u32 t0, 0;"),
    "in parts: bytes said by all": ("copied.ptx", "setp.eq.u32 leads, part, 0;", "setp.ge.u32 leads, part, 0;"),
    "in parts: some are missing": ("copied.ptx", "{{ (PARTS + warps - 1) // warps }};", "{{ PARTS // warps // 2 }};"),
    "in parts: to one place": ("copied.ptx", "mul.lo.u32 part, part, {{ COPIED }};", "mul.lo.u32 part, part, 0;"),
}
COMBINE: dict[str, tuple[str, str, str]] = {
    "combine: ended before stage 1": (
        "combine.ptx",
        "    @p bra AHEAD;\n    griddepcontrol.wait;\n",
        "    @p bra AHEAD;\n",
    ),
    "combine: lengths by plain loads": ("combine.ptx", "{% set EARLY = PDL %}", "{% set EARLY = false %}"),
    "combine, by lengths: before they are there": ("pieces.ptx", "        bar.sync 0;\n    }", "    }"),
    "combine: before there are partials": (
        "combine.ptx",
        "{% if PDL %}\n    griddepcontrol.wait;\n{% endif %}\n\n{% macro request",
        "\n{% macro request",
    ),
    "combine: groups not waited for": ("combine.ptx", "    bar.sync 0;\n", ""),
    "combine: half the groups of a warp": ("combine.ptx", "for i in range(5) if", "for i in range(1) if"),
    "combine: another group's O as it is": (
        "combine.ptx",
        "fma.rn.f32 acc{{ k }}, {{ theirs }}{{ k }}, weight,",
        "fma.rn.f32 acc{{ k }}, {{ theirs }}{{ k }}, ours,",
    ),
    "combine: pieces that are not there": (
        "combine.ptx",
        "setp.lt.and.s32 ok{{ u }}, s, used, mine;",
        "setp.lt.and.s32 ok{{ u }}, s, num_splits, mine;",
    ),
    "combine: the first part alone": ("combine.ptx", "    bra ROWS;\n", ""),
    "combine: over what groups had": (
        "combine.ptx",
        "    bar.sync 0;                                   // what",
        "    // what",
    ),
    "combine, by lengths: even ones as uneven ones": (
        "combine.ptx",
        "    @cut bra PIECES;\n",
        "    @cut bra PIECES;\n    setp.eq.u32 cut, 0, 0;\n",
    ),
    "combine, many: the next piece's place": ("combine.ptx", "else u * H * GROUPS %}", "else u * H %}"),
    "combine: another head": ("combine.ptx", "mul.lo.s64 d0, d0, {{ H }};", "mul.lo.s64 d0, d0, {{ H + 1 }};"),
}
_NEXT_FED = "        {{ NEXT_PIECE() | replace('bra EXIT', 'bra ' ~ FED_ALL) }}\n"
LOOP: dict[str, tuple[str, str, str]] = {
    "q over results on their way out": (
        "wide.ptx",
        "        {{ m.bar_sync(5, 256) }}                  // both have written the last piece's results\n",
        "",
    ),
    "an odd tile's buffer is kept": (
        "wide.ptx",
        "        {{ release(0, 1) }}\n{% endif %}\n{% endif %}\nDONE",
        "{% endif %}\n{% endif %}\nDONE",
    ),
    "an odd tile's parity": (
        "wide.ptx",
        "        @p xor.b32 phase, phase, 1;\n{% endif %}\n{% if not OVERLAPS %}",
        "{% endif %}\n{% if not OVERLAPS %}",
    ),
    "the producer begins anew": (
        "wide.ptx",
        _NEXT_FED,
        f"{_NEXT_FED}        mov.u32 j, 0;\n",
    ),
}
WIDE: dict[str, tuple[str, str, str]] = {
    "the last token": (
        "pieces.ptx",
        "min.s32 kv_end, kv_end, kv_len;",
        "min.s32 kv_end, kv_end, kv_len; sub.s32 kv_end, kv_end, 1;",
    ),
    "the last tile": (
        "pieces.ptx",
        "sub.s32 count, last_tile, first_tile;",
        "sub.s32 last_tile, last_tile, 1; sub.s32 count, last_tile, first_tile;",
    ),
    "another's pages": ("pieces.ptx", "cvt.s64.s32 d0, b;", "mov.u64 d0, 0;"),
    "one token for all": ("queries.ptx", "mul.lo.s64 stride, stride, t;", "mov.u64 stride, 0;"),
    "the second half of a page": ("copied.ptx", "{{ PAGE }}, t0;", "{{ PAGE }}, 0;"),
    "causal off by one": (
        "wide.ptx",
        "add.s32 t0, t0, token{{ r }};\n        add.s32 t0, t0, 1;",
        "add.s32 t0, t0, token{{ r }};",
    ),
    "S of the other tile is never let begin": ("wide.ptx", "    @p {{ m.bar_arrive(6, 256) | trim }} ", "    //"),
    "S of the last pair is not let begin": (
        "wide.ptx",
        "setp.ge.s32 p, count, 2;\n    @p {{",
        "setp.ge.s32 p, count, 3;\n    @p {{",
    ),
    "V is not zeroed": ("wide.ptx", "{0, 0, 0, 0};", "{0x7fc07fc0, 0, 0, 0};"),
    "no fence after P": ("wide.ptx", _FENCED + _PUBLISH, _PUBLISH),
    "no wait for P": ("wide.ptx", "    {{ m.bar_sync(1 + b, 256) }}\n", ""),
    "no wait for a free buffer": ("wide.ptx", "{{ m.mbar_wait(empty(b, i // HALF), 'phase') }}", ""),
    "no wait for a box": ("wide.ptx", "{{ m.mbar_wait(full(b, i), 'phase') }}", ""),
    "a buffer given back early": (
        "wide.ptx",
        "{{ m.wgmma_wait(0) }}\n        {{ release(1, 1) }}",
        "{{ release(1, 1) }}\n        {{ m.wgmma_wait(0) }}",
    ),
    "the maxima of other rows": (
        "wide.ptx",
        "MAXIMA[b] + 32 }}];\n{% endmacro %}",
        "MAXIMA[b] }}];\n{% endmacro %}",
    ),
    "half the sums": ("wide.ptx", "add.f32 l{{ r }}, l{{ r }}, f{{ r }};", ""),
    "gathered: no fence": ("gather.ptx", _FENCED, ""),
    "gathered: another's token": (
        "gather.ptx",
        "{{ m.remainder('t0', 't0', PAGE) }}",
        "mov.u32 t0, 0;",
    ),
    "another piece's rows": ("pieces.ptx", "mul.wide.s32 heads, piece, max_q_len;", "mov.b64 heads, 0;"),
    "a piece's LSE in the result's base": ("pieces.ptx", "@whole ld.param.f32 {{ dst }}", "ld.param.f32 {{ dst }}"),
    "a piece to the result": ("pieces.ptx", "@!whole bra SAID;", ""),
    "one head's rows": ("pieces.ptx", "mad.lo.s64 {{ dst }}, index, per_head, {{ dst }};", ""),
    "too few bytes expected": ("wide.ptx", "full(b, i), K_BOX,", "full(b, i), K_BOX - 128,"),
    **PARTS,
    **SENT,
    **COMBINE,
    **OVERLAP,
    **AHEAD,
    **ROWS,
    "rows: chunks of the first": ("wide.ptx", "xor.b32 t9, t7, {{ 16 * (i % 8) }};", "mov.b32 t9, t7;"),
    "even: the last products not waited for": (
        "wide.ptx",
        "{% if OVERLAPS %}\n        {{ m.wgmma_wait(0) }}\n{% endif %}\n{% for e in",
        "{% for e in",
    ),
    "even: results over V that others read": (
        "wide.ptx",
        "SETS == 1 %}\n        {{ m.bar_sync(3 + b, 128) }}",
        "SETS == 1 %}\n",
    ),
    "even, tiles of 32: results over V that the other reads": (
        "wide.ptx",
        "{% elif OVERLAPS %}\n        {{ m.bar_sync(5, 256) }}",
        "{% elif OVERLAPS %}\n        {{ m.bar_sync(3 + b, 128) }}",
    ),
    **MULTICAST,
    **{f"walk: {name}": mistake for name, mistake in LOOP.items()},
    "walk: the line of other lengths": ("line.ptx", "add.u32 t9, t8, t2;", "add.u32 t9, t8, t3;"),
    "walk: one piece a sequence": ("line.ptx", "    add.u32 t0, b, piece;", "    mov.u32 t0, b;"),
    "walk: the first pieces for all": ("line.ptx", "add.u32 {{ first }}, b, t6;", "mov.u32 {{ first }}, t6;"),
    "walk: a whole sequence as a piece": ("line.ptx", "@q or.b32 t0, t0, 0x80000000;", ""),
    "walk: one lane's sequences": ("line.ptx", "        @has add.s32 {{ scratch }}, {{ scratch }}, other;\n", ""),
}
PERSISTENT: dict[str, tuple[str, str, str]] = {
    **LOOP,
    **OVERLAP,
    **MULTICAST_LOOP,
    "empty sequences not written": ("listed.ptx", "setp.eq.s32 p, t1, 0;", "setp.eq.s32 p, t1, -1;"),
    "all empty sequences are the first": ("listed.ptx", "mad.lo.u32 b, t1, groups, seen;", "mov.u32 b, seen;"),
    "pieces without tiles": ("listed.ptx", "setp.le.s32 p, parts, 0;", "setp.le.s32 p, parts, 1;"),
    "summed by the last but one": (
        "fold.ptx",
        "        sub.u32 last, parts, 1;\n        setp.ne",
        "        sub.u32 last, parts, 2;\n        setp.ne",
    ),
    "the sums of the first sequence": ("fold.ptx", "mul.wide.s32 index, first, max_q_len;", "mov.b64 index, 0;"),
    "the same rows again": ("fold.ptx", "{{ k * listed.LINES }};", "0;"),
    "the LSE of another line": ("fold.ptx", "add.s64 lse_from{{ k }}, lse_from{{ k }}, lse_step;", ""),
}
NARROW: dict[str, tuple[str, str, str]] = {
    "no fence after P": ("narrow_consumers.ptx", _FENCED + _P_THERE, _P_THERE),
    "no barrier after P": ("narrow_consumers.ptx", _P_THERE, "        // P is there"),
    "the ring's parity": ("narrow.ptx", "@p xor.b32 {{ phase }}, {{ phase }}, 1;", ""),
    "no wait for a free box": (
        "narrow_producer.ptx",
        "        {{ m.mbar_wait('bars+%d' % (BARRIERS + 8 * SLOTS), 't1') }}\n",
        "",
    ),
    "O is not rescaled": ("narrow_consumers.ptx", "@!grown bra SAME;", "bra SAME;"),
    "the sums of three warps": (
        "narrow_end.ptx",
        "(1, 2, 3) %}\n        " + _OTHERS + "        add",
        "(1, 2) %}\n        " + _OTHERS + "        add",
    ),
    "causal off by one": (
        "narrow_consumers.ptx",
        "        add.s32 t0, t0, 1;\n        {{ pieces.visible('t0') }}",
        "        {{ pieces.visible('t0') }}",
    ),
    "V is not zeroed": ("narrow_consumers.ptx", "{0, 0, 0, 0};", "{0x7fc07fc0, 0, 0, 0};"),
    "gathered: told too early": (
        "narrow_producer.ptx",
        "gather.arrive(ns.bars, FED)",
        "gather.arrive(ns.bars, 2 * FED)",
    ),
    "a box too far": (
        "narrow_consumers.ptx",
        "(BOX * (c + ROPE) if WHOLE else 0) + 2048 * k)",
        "(BOX * (c + ROPE) if WHOLE else 0) + 2048 * (k - 1))",
    ),
    "the last products not waited for": ("narrow_end.ptx", "{{ m.wgmma_wait(0 if loop.last else 1) }}", ""),
    "the next portion's products not waited for": ("narrow_end.ptx", "(0 if loop.last else 1)", "(1)"),
    "a portion copied before it is there": (
        "narrow_end.ptx",
        "        {{ m.bar_sync('ours', 128) }}\n{% if start and",
        "{% if start and",
    ),
    "every portion the first": ("narrow_end.ptx", "(loop.index0, 128 * start)", "(loop.index0, 0)"),
    "the rope's box as a part of O": ("narrow_end.ptx", "{% if start and C < 64 * (start + WIDE) %}", "{% if false %}"),
    "a sequence without tokens sees some": ("narrow_consumers.ptx", "        bra MASK;\n", "        bra CLEAR;\n"),
    "grown for one warp alone": (
        "narrow_consumers.ptx",
        "        {{ m.bar_any('grown', 'ours', 128) }}\n",
        "        {{ m.bar_sync('ours', 128) }}\n",
    ),
    "nothing has grown since the first tile": (
        "narrow_consumers.ptx",
        "f0, 0f41000000, grown;",
        "f0, 0f7F800000, grown;",
    ),
    "a piece too long by a rounded quotient": ("macros.ptx", "        @more add.u32", "        // @more add.u32"),
    **PARTS,
    **TOGETHER,
    **OVERLAP,
    **AHEAD,
    "ahead: the next box": ("ahead.ptx", "        sub.u32 x, box, {{ ROPE }};\n", "        mov.u32 x, box;\n"),
    **ROWS,
    "rows: chunks of the first": ("narrow_consumers.ptx", "xor.b32 t6, copy_chunk, t4;", "mov.b32 t6, copy_chunk;"),
    "rows: one more": (
        "narrow_end.ptx",
        "setp.gt.and.s32 p, copy_rows, {{ i }}, copies;",
        "setp.ge.and.s32 p, copy_rows, {{ i }}, copies;",
    ),
}
_EARLIER = "        {{ m.mbar_wait('t2', 't1') }}\n"
_FULL = "{% endif %}\n        add.u32 bar, bar, {{ BARRIERS }};"
ORDERS = {  # by mistake: one sequence this long (None: the usual cases), in a seed's order, shows it
    "a box of the round before": ((700,), 4),
    "combine: ended before stage 1": ((1,), 0),
    "combine, by lengths: even ones as uneven ones": ((700, 700, 700), 0),
    "combine, many: the next piece's place": ((700,), 0),
    "multicast, persistent: gone before the other has arrived": (None, 3),
}
PAIR: dict[str, tuple[str, str, str]] = {
    "a box of the round before": ("narrow_consumers.ptx", _EARLIER + _FULL, _FULL),
    "O not yet exchanged": (
        "narrow_end.ptx",
        "        {{ m.bar_sync(3, THEIRS) }}\n{% if OVERLAPS",
        "{% if OVERLAPS",
    ),
    "exchanged over tiles in use": (
        "narrow_end.ptx",
        "        {{ m.bar_sync(3, THEIRS) }}               // all tiles are done with\n",
        "",
    ),
    "the other's O as it is": (
        "narrow_end.ptx",
        "mul.f32 theirs{{ j }}, theirs{{ j }}, f2;",
        "mov.f32 theirs{{ j }}, f2;",
    ),
    "the sums of one consumer": ("narrow_end.ptx", "add.f32 l{{ j }}, l{{ j }}, f{{ 6 + e }};", ""),
    "every tile by both": ("narrow_consumers.ptx", "add.u32 n0, first_tile, group;", "mov.u32 n0, first_tile;"),
    "the ring's parity": ("narrow_consumers.ptx", "        @p xor.b32 phase, phase, 1;\n", ""),
}
_OF_CLASS = "    @p ld.param.b32 {}, [{{{{ arg(['short_splits', 'middle_splits'][loop.revindex0]) }}}}];\n"
MIXED: dict[str, tuple[str, str, str]] = {
    "ahead: beyond the table": ("ahead.ptx", "        min.u32 t0, t0, width;\n", ""),
    "ahead: what it found is kept": ("ahead.ptx", "    {{ pieces.start() }}  ", "    // "),
    "short: pieces as of the part before": (
        "combine.ptx",
        _OF_CLASS.format("pieces"),
        _OF_CLASS.format("num_splits") + "    mov.u32 pieces, num_splits;\n",
    ),
    "short: long ones, too": ("pieces.ptx", "p, t0, {{ SHORT[-1][0] }};", "p, t0, {{ SHORT[-1][0] * 64 }};"),
    "short: the combine has no such": ("combine.ptx", "p, kv_len, {{ tokens }};", "p, kv_len, -1;"),
    "short: the partials of one piece": (
        "pieces.ptx",
        "    add.u32 piece, piece, split;\n    setp",
        "    setp",
    ),
    "short: the first rows alone": ("pieces.ptx", "    mov.u32 row_block, block0;", "    mov.u32 row_block, 0;"),
    "short: as many blocks as of 64 rows": (
        "pieces.ptx",
        "{{ m.divide('split%d' % i, 't0', (G + class[1] - 1) // class[1]) }}",
        "{{ m.divide('split%d' % i, 't0', (G + BLOCK_M - 1) // BLOCK_M) }}",
    ),
    "short: boxes given back early": ("wide.ptx", "'empty', i, 'of a short sequence'), 4)", "'empty', i, ''), 3)"),
    "middle: the combine has the other class": ("combine.ptx", "for tokens in SHORT | reverse", "for tokens in SHORT"),
    "middle: rows of wide blocks": (
        "pieces.ptx",
        "selp.b32 block_rows, {{ SHORT[1][1] }},",
        "selp.b32 block_rows, 64,",
    ),
    "middle: pieces of the other class": (
        "pieces.ptx",
        "selp.b32 num_splits, splits1, splits0, middle;",
        "selp.b32 num_splits, splits0, splits1, middle;",
    ),
    "middle: as many blocks as of the first class": (
        "pieces.ptx",
        "selp.b32 row_block, block1, block0, middle;",
        "mov.u32 row_block, block0;",
    ),
    "middle: a quotient by the other class's pieces": (
        "pieces.ptx",
        "selp.b32 inverse, inverse1, inverse0, middle;",
        "mov.u32 inverse, inverse0;",
    ),
    "middle: short ones, too": ("pieces.ptx", "middle, t0, {{ SHORT[0][0] }};", "middle, t0, -1;"),
}
MISTAKES = {
    "decode_splitk_asm": WIDE,
    "decode_mixed_asm": MIXED,
    "decode_persistent_asm": PERSISTENT,
    "decode_narrow_asm": NARROW,
    "decode_narrow_pair_asm": PAIR,
}
