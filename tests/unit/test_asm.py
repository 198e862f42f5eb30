"""The PTX templates and their toolchain: faults are said with their line; every knob is assembled within budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import covering
import pytest
from covering import Row

from mla_jit import plan, settings, target
from mla_jit.compile import ptx, render
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.config import Config
from mla_jit.errors import CompileError, IllegalArtifact
from mla_jit.launch import cuda
from mla_jit.launch.base import Binding, Packed, TensorView
from mla_jit.ops.decode import asm_persistent, asm_splitk
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem

HOPPER = target.by_name("sm_90")
WIDE, NARROW = asm_splitk.DECODE_SPLITK_ASM, asm_splitk.DECODE_NARROW_ASM
PAIR, PERSISTENT = asm_splitk.DECODE_NARROW_PAIR_ASM, asm_persistent.DECODE_PERSISTENT_ASM
MIXED = asm_splitk.DECODE_MIXED_ASM
FILES = {
    WIDE.name: "decode_splitk.ptx", NARROW.name: "decode_narrow.ptx", PAIR.name: "decode_narrow_pair.ptx",
    MIXED.name: "decode_mixed.ptx", PERSISTENT.name: "decode_persistent.ptx", "decode_combine_asm": "combine.ptx",
}  # fmt: skip
GOLDEN = Path(__file__).parents[1] / "golden" / "asm"
PLAIN = DecodeProblem(num_heads=16, batch=4)

FACTORS: dict[str, list[Any]] = {
    "heads": [(16, 1), (128, 1), (1, 1), (12, 1), (40, 1), (20, 2)],  # (query, KV)
    "dims": [(512, 64), (256, 32), (512, 0), (384, 64), (80, 24)],
    "dtype": ["bf16", "fp16"],
    "out_dtype": ["same", "fp32"],
    "page_size": [64, 256, 16, 8, 1],
    "block_n": [64, 32],
    "flat_pages": [True, False],
    "q_len": [1, 2, 3],
    "paging": ["table", "csr", "csr+lens"],
    "batch": [1, 40, 600],
    "splits": [None, 1, 2, 8],  # two pieces: a cluster puts them together
    "causal": [True, False],
    "lse": [False, True],
    "soft_cap": [False, True],
    "sinks": [False, True],
    "scales": [False, True],
    "context_parallel": [False, True],
    "ragged": [False, True],
    "index64": [False, True],
    "lazy": [True, False],
    "policy": ["evict_first", "evict_normal"],
    "pdl": [True, False],
    "bounded": [False, True],
    "walk": [False, True],
    "multicast": [False, True],
    "short_m": [16, 24, 32],
    "middle": [0, 8192],
}
COMBINE: dict[str, list[Any]] = {
    "combine": [(1, 512), (1, 64), (1, 128), (1, 256), (4, 512), (8, 64), (2, 256)],  # heads, columns
    "combine_ahead": [8, 16, 32],
    **{
        name: FACTORS[name] for name in ("heads", "dims", "dtype", "out_dtype", "page_size", "q_len", "paging", "batch")
    },
    **{name: FACTORS[name] for name in ("lse", "sinks", "context_parallel", "ragged", "index64", "pdl", "walk")},
}  # what the second kernel is filled in with


def allowed(row: Row) -> bool:
    gathered = row.get("page_size", 64) < 8 or not row.get("flat_pages", True)
    if (row.get("block_n", 64) == 32 and gathered) or (row.get("middle") and row.get("short_m", 16) > 16):
        return False
    return not (row.get("context_parallel") and (row.get("sinks") or row.get("paging") == "csr"))


ROWS, COMBINE_ROWS = covering.pairwise(FACTORS, allowed), covering.pairwise(COMBINE, allowed)


def problem_of(row: Row) -> DecodeProblem:
    paging = row["paging"]
    return DecodeProblem(
        num_heads=row["heads"][0], num_kv_heads=row["heads"][1], kv_lora_rank=row["dims"][0], rope_dim=row["dims"][1],
        q_dtype=row["dtype"], kv_dtype=row["dtype"],
        out_dtype=row["dtype"] if row["out_dtype"] == "same" else row["out_dtype"],
        page_size=row["page_size"], flat_pages=row["flat_pages"], q_len=row["q_len"],
        paging=paging.partition("+")[0], has_lens=paging != "csr",
        batch=row["batch"], max_kv_len=8192, num_kv_splits=row["splits"], causal=row["causal"], lse=row["lse"],
        soft_cap=row["soft_cap"], sinks=row["sinks"], kv_scale=row["scales"],
        context_parallel=row["context_parallel"], ragged=row["ragged"],
        index64=("table", "lens", "kv_indptr", "last", "qo_indptr") if row["index64"] else (),
    )  # fmt: skip


def assembled(row: Row) -> list[tuple[str, Artifact, dict[str, Any]]]:
    """(name, artifact, constants) of the kernels of each variant that serves the row. For a child process."""
    found = []
    with settings.scope(bounded_waits=row["bounded"]):
        for variant in (WIDE, NARROW, PAIR, MIXED, PERSISTENT):
            problem = problem_of(row)
            if variant is MIXED:  # for one sequence in many pieces
                problem = dataclasses.replace(problem, batch=1, num_kv_splits=None)
            config = variant.default(problem, HOPPER)
            knobs = ("lazy", "policy", "pdl", "multicast", "short_m", "middle")
            config = config.replace(**{k: row[k] for k in knobs if k in config})
            if variant is WIDE:
                walk = row["walk"] and row["block_n"] == 64
                config = config.replace(block_n=row["block_n"], walk=walk, together=not walk)
            if variant.rejects(problem, HOPPER, config) is None:
                source = next(s for s in variant.sources(problem, HOPPER, config) if s.toolchain == "ptx")
                found.append((source.name, ptx.compile_source(source), dict(source.constants)))
    return found


def combined(row: Row) -> list[tuple[str, Artifact, dict[str, Any]]]:
    """The same of the second kernel, of wide and of mixed blocks."""
    found = []
    plain = {name: values[0] for name, values in FACTORS.items()}
    for variant in (WIDE, MIXED):
        problem = problem_of(plain | row | ({"batch": 1} if variant is MIXED else {}))
        config = variant.default(problem, HOPPER).replace(
            combine_h=row["combine"][0], combine_d=row["combine"][1], combine_ahead=row["combine_ahead"],
            pdl=row["pdl"], num_kv_splits=9, **({"walk": row["walk"], "together": False} if variant is WIDE else {}),
        )  # fmt: skip
        if variant.rejects(problem, HOPPER, config) is None:
            for source in variant.sources(problem, HOPPER, config)[1:]:
                found.append((source.name, ptx.compile_source(source), dict(source.constants)))
    return found


def source_of(variant: Variant = NARROW, problem: DecodeProblem = PLAIN, which: int = 0, **changes: Any) -> Source:
    config = variant.default(problem, HOPPER).replace(**changes)
    assert variant.rejects(problem, HOPPER, config) is None
    return variant.sources(problem, HOPPER, config)[which]


def edited(source: Source, file: str, old: str, new: str) -> Source:
    """The source with another text of one template."""
    files = json.loads(source.content)
    for entry in files:
        if entry[0] == file:
            assert old in entry[1]
            entry[1] = entry[1].replace(old, new, 1)
    return dataclasses.replace(source, content=json.dumps(files))


def test_every_knob_is_assembled_within_its_budget() -> None:
    """A pairwise covering array of what a template is filled in with: no spills, and none of ptxas's advice."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        stages = pool.map(assembled, ROWS), pool.map(combined, COMBINE_ROWS)
        outcomes = list(itertools.chain.from_iterable(itertools.chain(*stages)))
    assert sum(name == "decode_combine_asm" for name, *_ in outcomes) >= len(COMBINE_ROWS)
    assert {name for name, *_ in outcomes} == set(FILES)
    for name, artifact, constants in outcomes:
        head = render.header("sm_90a", FILES[name])
        stack = head.registers.get("stack", 0) if constants.get("GATHER") and constants.get("WALK", True) else 0
        assert artifact.spill_bytes <= stack <= 16, constants
        assert artifact.registers <= head.registers["start"], constants
        assert artifact.registers * artifact.threads <= HOPPER.registers_sm, constants
        assert artifact.smem_bytes == constants["ARENA"] <= HOPPER.smem_bytes
        assert bool(artifact.extra["barriers"]) == constants.get("DEBUG", False)


@pytest.mark.parametrize(
    ("heads", "rank", "rope", "page", "fields"),
    [
        (64, 384, 64, 16, {"q_len": 2, "paging": "csr", "has_lens": False, "out_dtype": "fp32"}),
        (40, 256, 32, 7, {"q_len": 2, "soft_cap": True}),
        (64, 384, 64, 256, {"ragged": True, "paging": "csr", "has_lens": False, "out_dtype": "fp32", "batch": 300}),
        (12, 256, 32, 256, {"q_len": 2, "paging": "csr", "has_lens": False}),
        (128, 512, 64, 1, {}),
        (64, 512, 64, 256, {"q_len": 2, "paging": "csr", "has_lens": False, "soft_cap": True}),
        (64, 384, 64, 24, {"q_len": 2, "paging": "csr", "has_lens": False, "out_dtype": "fp32", "flat_pages": True}),
        (40, 512, 64, 48, {"ragged": True, "soft_cap": True, "context_parallel": True, "flat_pages": True}),
    ],
)
def test_who_walks_and_gathers_has_registers_enough(
    heads: int, rank: int, rope: int, page: int, fields: dict[str, Any]
) -> None:
    """Pages, strides and a walk meet in the 72 registers of those that gather, results and addresses in the 216 of the
    consumers beside them: a few bytes of stack, not a refusal. The first four once took 32; the last two are copied
    in parts."""
    given = {"batch": 40, "flat_pages": False, "max_kv_len": 8192, "lse": True} | fields
    problem = DecodeProblem(num_heads=heads, kv_lora_rank=rank, rope_dim=rope, page_size=page, **given)
    assert ptx.compile_source(source_of(WIDE, problem, walk=True, together=False)).spill_bytes <= 16
    listed = dataclasses.replace(problem, scheduler="persistent")
    assert ptx.compile_source(source_of(PERSISTENT, listed)).spill_bytes <= 16


@pytest.mark.parametrize("variant", [WIDE, PERSISTENT, PAIR, MIXED], ids=lambda v: v.name)
def test_the_roles_registers_fit_the_device(variant: Variant) -> None:
    """What setmaxnreg asks for: a producer's and two consumers' warpgroups share what the program starts with."""
    count = render.header("sm_90a", FILES[variant.name]).registers
    for producer, consumer in (("producer", "consumer"), ("parts", "beside_parts"), ("gathering", "beside")):
        assert 128 * (count[producer] + 2 * count[consumer]) <= 3 * 128 * count["start"] <= HOPPER.registers_sm
    assert all(each % 8 == 0 for each in count.values())


def test_every_pair_occurs() -> None:
    for factors, rows in ((FACTORS, ROWS), (COMBINE, COMBINE_ROWS)):
        for a, b in itertools.combinations(factors, 2):
            seen = {(repr(row[a]), repr(row[b])) for row in rows}
            wanted = {(repr(x), repr(y)) for x, y in itertools.product(factors[a], factors[b]) if allowed({a: x, b: y})}
            assert wanted == seen, (a, b)


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        (WIDE, DecodeProblem(num_heads=128, batch=64, kv_lora_rank=128)),
        (NARROW, DecodeProblem(num_heads=8, batch=64, kv_lora_rank=128)),
        (PAIR, DecodeProblem(num_heads=8, batch=64, kv_lora_rank=128, page_size=1)),
        (WIDE, DecodeProblem(num_heads=128, batch=65, kv_lora_rank=128)),
        (PERSISTENT, DecodeProblem(num_heads=128, batch=64, kv_lora_rank=128, lse=True)),
        (MIXED, DecodeProblem(num_heads=128, kv_lora_rank=128, lse=True)),
        (
            WIDE,
            DecodeProblem(
                num_heads=40,
                kv_lora_rank=128,
                rope_dim=32,
                page_size=16,
                batch=2,
                q_len=2,
                lse=True,
                sinks=True,
                soft_cap=True,
                paging="csr",
                has_lens=False,
                ragged=True,
            ),
        ),
        (
            WIDE,
            DecodeProblem(num_heads=64, kv_lora_rank=128, rope_dim=32, batch=2, num_kv_splits=2, lse=True, sinks=True),
        ),
    ],
    ids=["wide", "narrow", "pair", "walk", "persistent", "mixed", "much", "together"],
)
def test_rendered_text_is_as_committed(
    variant: Variant, problem: DecodeProblem, request: pytest.FixtureRequest
) -> None:
    """So that a review sees what a change of a template does. `--full` writes them anew."""
    file = GOLDEN / f"{request.node.callspec.id}.ptx"
    changes = {"walk": "walk" in request.node.callspec.id} if variant is WIDE else {}
    changes |= {"together": False} if changes.get("walk") else {}
    text = render.render(source_of(variant, problem, **changes)).text
    if request.config.getoption("--full"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), (
        f"run `pytest --full {Path(__file__).name} -k committed` and look at the difference"
    )


@pytest.mark.parametrize(("ahead", "per_sm"), [(8, 3), (16, 2), (32, 1)])
def test_the_combine_has_a_program_a_part_or_one_an_sm_more_than_the_device_holds(ahead: int, per_sm: int) -> None:
    for batch, parts in ((3, 96), (300, 9600)):  # of four heads
        problem = DecodeProblem(num_heads=128, batch=batch, max_kv_len=65536)
        config = WIDE.default(problem, HOPPER).replace(combine_h=4, combine_d=512, combine_ahead=ahead)
        *_, combine = WIDE.launches(problem, HOPPER, config)
        assert combine.kernel == 1
        assert combine.grid == (min(parts, HOPPER.sms * (per_sm + 1)), 1, 1)
        assert dict(WIDE.sources(problem, HOPPER, config)[1].constants)["PER_SM"] == per_sm


def test_the_combine_is_as_committed(request: pytest.FixtureRequest) -> None:
    problem = DecodeProblem(num_heads=16, batch=40, max_kv_len=65536, sinks=True, lse=True, q_len=2, num_kv_splits=8)
    file, text = GOLDEN / "combine.ptx", render.render(source_of(NARROW, problem, 1, combine_h=1, combine_d=128)).text
    if request.config.getoption("--full"):
        file.write_text(text)
    assert text == file.read_text()


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_kernel_tells_as_many_waits_in_vain_as_the_host_has_room_for() -> None:
    with settings.scope(bounded_waits=True):
        text = render.render(source_of()).text
    assert f"setp.ge.u32 over, since, {cuda.WAITS_TOLD};" in text


def test_a_name_that_is_not_filled_in_is_said_with_its_line() -> None:
    commit = "{{ m.wgmma_commit() }}"
    source = edited(source_of(), "narrow_consumers.ptx", commit, f"{commit} {{{{ NO_SUCH }}}}")
    with pytest.raises(CompileError, match=r"narrow_consumers\.ptx, line \d+: 'NO_SUCH' is undefined"):
        render.render(source)


def test_a_child_that_is_forked_while_a_template_is_rendered_renders() -> None:
    source = source_of()
    with render._turn:
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if render.render(source).text else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_broken_template_is_said_with_its_line() -> None:
    source = edited(source_of(), "pieces.ptx", "{% if CP %}", "{% if %}")
    with pytest.raises(CompileError, match=r"pieces\.ptx, line \d+"):
        render.render(source)


def test_constants_are_those_of_the_header() -> None:
    source = source_of()
    with pytest.raises(CompileError, match=r"are not those that decode_narrow\.ptx takes: EXTRA"):
        render.render(dataclasses.replace(source, constants=(*source.constants, ("EXTRA", 1))))
    with pytest.raises(CompileError, match=r"are not those that decode_narrow\.ptx takes: C"):
        render.render(dataclasses.replace(source, constants=tuple(c for c in source.constants if c[0] != "C")))


def test_a_constant_that_is_not_used_is_an_error() -> None:
    source = edited(source_of(), "decode_narrow.ptx", "constants: [ARENA, ", "constants: [UNREAD, ARENA, ")
    with pytest.raises(CompileError, match="does not use UNREAD"):
        render.render(dataclasses.replace(source, constants=(*source.constants, ("UNREAD", 1))))


def test_a_parameter_that_is_not_read_is_an_error() -> None:
    source = source_of()
    with pytest.raises(CompileError, match="does not read the parameters unread_ptr"):
        render.render(dataclasses.replace(source, signature=(*source.signature, ("unread_ptr", "*fp32"))))
    without = tuple(entry for entry in source.signature if entry[0] != "v_scale")
    with pytest.raises(CompileError, match="reads the parameter v_scale"):
        render.render(dataclasses.replace(source, signature=without))


def test_the_assemblers_message_comes_with_the_templates_line() -> None:
    source = edited(source_of(), "narrow.ptx", "    mov.u32 slot, 0;\n", "    mvo.u32 slot, 0;\n")
    text = dict(json.loads(source.content))["narrow.ptx"]
    line = next(n for n, line in enumerate(text.splitlines(), 1) if line.strip() == "mvo.u32 slot, 0;")
    with pytest.raises(CompileError, match=rf"\[mvo\.u32 slot, 0; = narrow\.ptx, line {line}\]"):
        ptx.compile_source(source)


@pytest.mark.parametrize(
    ("variant", "file", "old", "new"),
    [
        (WIDE, "wide.ptx", ".reqntid {{ THREADS }}, 1, 1\n.minnctapersm 1\n", ".minnctapersm 1\n"),
        (NARROW, "narrow_consumers.ptx", "        {{ m.wgmma_commit() }}\n        {{ m.wgmma_wait(0) }}\n{% if R and",
         "        {{ m.wgmma_commit() }}\n{% if R and"),
    ],
    ids=["registers that cannot be moved", "an accumulator read too early"],
)  # fmt: skip
def test_advice_is_an_error(variant: Variant, file: str, old: str, new: str) -> None:
    with pytest.raises(CompileError, match=r"\(C75\d\d\)|setmaxnreg"):
        ptx.compile_source(edited(source_of(variant), file, old, new))


def test_more_than_the_limits_is_illegal() -> None:
    source = source_of()
    assert source.limits is not None
    small = dataclasses.replace(source.limits, smem_bytes=100_000)
    with pytest.raises(IllegalArtifact, match="bytes of shared memory, the target has 100000"):
        ptx.compile_source(dataclasses.replace(source, limits=small))


def test_a_change_of_an_imported_template_is_another_key() -> None:
    source = source_of()
    assert edited(source, "macros.ptx", "wgmma.fence", "wgmma.fence").key == source.key
    assert edited(source, "macros.ptx", "wgmma.fence", "wgmma.fence ").key != source.key
    assert [name for name, _ in json.loads(source.content)] == [
        "decode_narrow.ptx",
        "ahead.ptx",
        "copied.ptx",
        "gather.ptx",
        "macros.ptx",
        "narrow.ptx",
        "narrow_consumers.ptx",
        "narrow_end.ptx",
        "narrow_producer.ptx",
        "pieces.ptx",
        "queries.ptx",
        "together.ptx",
    ]


@pytest.mark.parametrize(
    ("fields", "changes", "asks"),
    [
        ({}, {}, True),
        ({"page_size": 16}, {}, True),
        ({"page_size": 1}, {}, False),  # gathered
        ({"paging": "csr"}, {}, False),  # nobody knows how many page ids there are
        ({"has_lens": False, "paging": "csr"}, {}, False),
        ({}, {"pdl": False}, False),  # nothing to be ahead of
    ],
)
def test_first_tiles_are_asked_for_ahead(fields: dict[str, Any], changes: dict[str, Any], asks: bool) -> None:
    for variant in (WIDE, NARROW, PAIR, MIXED):
        problem = DecodeProblem(**{"num_heads": 128 if variant in (WIDE, MIXED) else 16, **fields})
        source = source_of(variant, problem, **changes)
        assert bool(dict(source.constants)["ASKS"]) is asks
        assert ("table_width" in dict(source.signature)) is asks
        assert ("cp.async.bulk.prefetch.tensor" in render.render(source).text) is asks


@pytest.mark.parametrize(
    ("fields", "short_m", "middle"),
    [
        ({"num_heads": 128}, 16, 8192),
        ({"num_heads": 20}, 16, 0),  # no blocks of 32 rows beside longer ones
        ({"num_heads": 128, "batch": 16, "q_len": 2}, 32, 0),  # two pieces are too few programs for blocks of 16
        ({"num_heads": 64, "batch": 64}, 32, 0),
    ],
)
def test_the_default_has_as_many_classes_as_there_are_programs_for(
    fields: dict[str, Any], short_m: int, middle: int
) -> None:
    problem = DecodeProblem(max_kv_len=131072, **fields)
    config = MIXED.default(problem, HOPPER)
    assert (config["short_m"], config["middle"]) == (short_m, middle)
    assert MIXED.rejects(problem, HOPPER, config) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"short": 8192, "middle": 8192}, "middle 8192: more than short"),
        ({"short_m": 24}, "blocks of at most 32 rows"),
        ({"middle": 0, "short_m": 32}, None),
    ],
)
def test_classes_of_short_sequences_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str | None) -> None:
    problem = DecodeProblem(num_heads=128, max_kv_len=131072)
    said = MIXED.rejects(problem, HOPPER, MIXED.default(problem, HOPPER).replace(**changes))
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.parametrize("heads", [64, 128])
def test_both_kernels_of_a_call_stay_in_the_instruction_cache(heads: int) -> None:
    """With more than 128 KB of code all calls are slower (decode_mixed.ptx); what else a cubin holds is about 10 KB."""
    problem = DecodeProblem(num_heads=heads, max_kv_len=131072)
    config = MIXED.default(problem, HOPPER)
    assert config["middle"]
    sizes = [len(ptx.compile_source(source).binary) for source in MIXED.sources(problem, HOPPER, config)]
    assert len(sizes) == 2
    assert sum(sizes) <= 140_000


# ---------------------------------------------------------------------------------------------------- in the rows


@pytest.mark.parametrize(
    ("fields", "shares"),
    [
        ({"num_heads": 128}, True),
        ({"num_heads": 100}, True),
        ({"num_heads": 64}, False),
        ({"num_heads": 160}, False),  # three blocks
        ({"num_heads": 64, "q_len": 2}, True),
        ({"num_heads": 64, "q_len": 2, "ragged": True}, False),  # a sequence with one token has one block
        ({"num_heads": 128, "q_len": 3, "ragged": True}, True),
        ({"num_heads": 256, "num_kv_heads": 2}, True),
        ({"num_heads": 128, "page_size": 16}, True),
        ({"num_heads": 128, "page_size": 4}, False),  # gathered
        ({"num_heads": 128, "page_size": 16, "kv_lora_rank": 128}, True),
        ({"num_heads": 128, "page_size": 64, "kv_lora_rank": 128, "rope_dim": 0}, True),
        ({"num_heads": 128, "page_size": 16, "kv_lora_rank": 128, "rope_dim": 0}, False),  # a lane with nothing to copy
        ({"num_heads": 128, "q_len": 0}, False),
        ({"num_heads": 128, "num_kv_splits": 2}, False),  # put together by clusters
    ],
)
def test_who_shares_tiles(fields: dict[str, Any], shares: bool) -> None:
    """Clusters of two divide the grid, and no kernel knows of clusters that is not launched so."""
    problem = DecodeProblem(**{"batch": 3, "page_size": 64, **fields})
    config = WIDE.default(problem, HOPPER).replace(multicast=True, together="num_kv_splits" in fields, block_n=64)
    assert WIDE.rejects(problem, HOPPER, config) is None
    first, *_ = WIDE.launches(problem, HOPPER, config)
    constants = dict(WIDE.sources(problem, HOPPER, config)[0].constants)
    assert constants["MULTICAST"] == shares
    assert (first.cluster == 2) == (shares or bool(constants["SPLITS"]))
    assert first.grid[0] % first.cluster == 0
    listed = dataclasses.replace(problem, scheduler="persistent", num_kv_splits=None)
    if not problem.q_len:
        return
    config = PERSISTENT.default(listed, HOPPER).replace(multicast=True)
    walk = next(launch for launch in PERSISTENT.launches(listed, HOPPER, config) if launch.kernel == 0)
    assert (walk.cluster == 2) == (shares or "num_kv_splits" in fields)
    assert walk.grid[0] % walk.cluster == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_kernel_that_may_start_early_waits(overlaps: bool) -> None:
    """Each launch that may begin before others have ended has a text that waits for them, and no other does."""
    problem = DecodeProblem(num_heads=128, batch=4, max_kv_len=65536)
    for variant in (WIDE, NARROW, PAIR, MIXED):
        config = variant.default(problem, HOPPER).replace(pdl=overlaps)
        sources = variant.sources(problem, HOPPER, config)
        for launch in variant.launches(problem, HOPPER, config):
            assert launch.pdl == overlaps
            assert ("griddepcontrol.wait" in render.render(sources[launch.kernel]).text) == overlaps
    listed = dataclasses.replace(problem, scheduler="persistent")
    config = PERSISTENT.default(listed, HOPPER)
    schedule, walk = PERSISTENT.launches(listed, HOPPER, config)
    assert (schedule.pdl, walk.pdl) == (False, True)
    assert "griddepcontrol.wait" in render.render(PERSISTENT.sources(listed, HOPPER, config)[0]).text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_dtype": "fp16"}, "must both be"),
        ({"kv_lora_rank": 516}, "kv_lora_rank 516"),
        ({"rope_dim": 72}, "rope_dim 72"),
        ({"misaligned": ("q",)}, "q: the base or a stride"),
        ({"scheduler": "persistent"}, "persistent scheduler"),
    ],
)
def test_says_why_not(changes: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(PLAIN, **changes)
    for variant in (WIDE, NARROW):
        assert reason in (variant.rejects(problem, HOPPER, variant.default(problem, HOPPER)) or "")


def test_only_where_there_is_a_template() -> None:
    for name, row in target.targets().items():
        legal = WIDE.rejects(PLAIN, row, WIDE.default(PLAIN, row)) is None
        assert legal == (row.isa == "sm_90a"), name


@pytest.mark.parametrize(("heads", "block"), [(1, 8), (8, 8), (9, 16), (24, 24), (32, 32), (33, 32), (128, 32)])
def test_narrow_blocks_are_as_narrow_as_the_rows(heads: int, block: int) -> None:
    problem = DecodeProblem(num_heads=heads)
    config = NARROW.default(problem, HOPPER)
    assert NARROW.rejects(problem, HOPPER, config) is None
    assert config["block_m"] == block
    if heads < block + 1:
        assert "of fewer than" in (NARROW.rejects(problem, HOPPER, config.replace(block_m=block + 8)) or "")


@pytest.mark.parametrize(
    ("heads", "batch", "length", "variant", "block"),
    [
        (16, 64, 4096, NARROW, 16),
        (128, 1, 1024, NARROW, 16),  # little work: narrow blocks are more programs
        (128, 128, 4096, WIDE, 64),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_which_the_model_takes(dtype: str, heads: int, batch: int, length: int, variant: Variant, block: int) -> None:
    """Without a measured row, of both dtypes; nowhere else than where they are legal."""
    problem = DecodeProblem(
        num_heads=heads, q_dtype=dtype, kv_dtype=dtype, out_dtype=dtype, batch=batch, max_kv_len=length, hinted=True
    )
    choice = plan.analytic(problem, HOPPER)
    assert (choice.variant, choice.config["block_m"]) == (variant, block)
    assert choice.config == variant.default(problem, HOPPER)
    fp8 = dataclasses.replace(problem, kv_dtype="fp8_e4m3")
    assert plan.analytic(fp8, HOPPER).variant.backend == "triton"
    assert plan.analytic(problem, target.by_name("sm_80")).variant.backend == "triton"


def test_a_map_comes_without_shape_and_strides() -> None:
    problem = PLAIN
    config: Config = NARROW.default(problem, HOPPER)
    artifact = ptx.compile_source(NARROW.sources(problem, HOPPER, config)[0])
    launch = NARROW.launches(problem, HOPPER, config)[0]
    numbers = {a.name: 1 for a in launch.args if a.kind in ("i32", "i64")}
    view = TensorView(64, 576, 576, 1152, "bf16")
    packed = Packed([artifact], [launch], Binding(numbers, {"kv": view, "kpe": view}))
    assert len(packed.addresses[0]) == len(launch.args)
    assert [(arg.name, artifact.extra["tma"][parameter]) for _, _, parameter, arg in packed.maps] == [
        ("kv", {"swizzle": 3, "block_size": [64, 64]}),
        ("kpe", {"swizzle": 3, "block_size": [64, 64]}),
    ]
