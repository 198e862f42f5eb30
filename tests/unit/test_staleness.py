"""No template changes unnoticed: what rows were measured with is what stands under the revision that they name.

    python tests/unit/test_staleness.py --record

writes tests/golden/templates.json: of each variant its revision, the SHA-256 of its templates' text, and `alike`, the
kernels (source_hash) of shipped rows of this revision that came of an earlier text and are said to take the same time.
That a stale row serves as "stale" at run time, never as "measured", is tested in test_store.py, test_tuned_choice.py
and test_hints.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from mla_jit import ops, plan, target
from mla_jit.compile import triton
from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.ops.decode import blocked_cpu, splitk
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem, PrefillProblem
from mla_jit.tuning import shipped
from mla_jit.tuning.candidate import _source_hash
from mla_jit.tuning.rows import Trial

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "templates.json"
RECORD = "python tests/unit/test_staleness.py --record"
TARGETS = ("sm_80", "sm_90", "gfx942")
PROBLEMS = (
    DecodeProblem(num_heads=16, batch=4),
    DecodeProblem(num_heads=128),
    DecodeProblem(num_heads=128, batch=64, q_len=2, lse=True),
    DecodeProblem(num_heads=16, batch=4, kv_dtype="fp8_e4m3", paging="csr"),
    PrefillProblem(num_heads=16, num_kv_heads=16, lse=True),
    PrefillProblem(num_heads=16, num_kv_heads=4, batch=3, kv_dtype="fp8_e4m3", causal=False),
)

Templates = dict[str, dict[str, dict[str, Any]]]  # by op and variant

# ------------------------------------------------------------------------------------------------------------ templates


def text(variant: Variant) -> str:
    """The templates of a variant as its Sources have them; of a host variant its module."""
    if variant.host is not None:
        return Path(inspect.getfile(variant.host)).read_text(encoding="utf-8")
    found = set()
    for problem in (problem for problem in PROBLEMS if problem.op == variant.op):
        for where in map(target.by_name, TARGETS):
            config = variant.default(problem, where)
            if variant.rejects(problem, where, config) is None:
                if "num_kv_splits" in config:  # so that there is a combine
                    config = config.replace(num_kv_splits=4)
                found |= {(source.name, source.content) for source in variant.sources(problem, where, config)}
    assert found, f"{variant.name} accepts none of PROBLEMS on TARGETS; add one that it does"
    return json.dumps(sorted(found))


def today() -> Templates:
    """What there is now; nothing in it depends on the compiler, on paths or on line numbers."""
    return {
        op: {
            variant.name: {
                "revision": variant.revision,
                "sha256": hashlib.sha256(text(variant).encode()).hexdigest(),
            }
            for variant in ops.variants(op)
        }
        for op in ops.OPS
    }


def recorded() -> Templates:
    found: Templates = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


def changes(now: Templates, before: Templates) -> Iterator[str]:
    """Where the templates are not as recorded, and what to do, a line each."""
    for op, variants in now.items():
        known = before.get(op, {})
        for name in [name for name in known if name not in variants]:
            yield f"{name} is no variant of {op} any more; record that: {RECORD}"
        for name, new in variants.items():
            if (old := known.get(name)) is None:
                yield f"{name} is not recorded; record it: {RECORD}"
            elif new["revision"] < old["revision"]:
                yield f"{name}: its revision fell from {old['revision']} to {new['revision']}; give it the next one"
            elif new["revision"] > old["revision"]:
                yield f"{name}: its revision was raised to {new['revision']}; record it: {RECORD}"
            elif new["sha256"] != old["sha256"]:
                yield (
                    f"{name}: its template is another than that of revision {old['revision']}. Raise `revision` in its "
                    f"row, which makes what was measured stale, and record it; or, if the change cannot alter times, "
                    f"record it only: {RECORD}"
                )


def record(root: Path = ROOT, golden: Path = GOLDEN) -> None:
    """Writes what there is now; the rows that are shipped now are said to be of it."""
    now = today()
    for variants in now.values():
        for new in variants.values():
            new["alike"] = []
    for _, trial in foreign(root, now):
        alike = now[trial.op][trial.variant]["alike"]
        alike[:] = sorted({*alike, trial.source_hash})
    golden.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


# --------------------------------------------------------------------------------------------------------- shipped rows


def files(root: Path) -> list[Path]:
    """The files of shipped rows. Beside them only figures of peers may lie."""
    found = sorted((root / "tuning_db").glob("*/*.jsonl"))
    return [path for path in found if path.stem.removeprefix("peers_") not in ops.OPS or path.stem in ops.OPS]


def trials(path: Path) -> Iterator[tuple[str, Trial]]:
    """(where it stands, row) of the lines that are rows; `shipped.check` tells of the others."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            yield f"{path.parent.name}/{path.name}, line {number}", Trial.from_json(line)
        except InvalidInput:
            continue


@functools.cache
def variants(op: str) -> dict[str, Variant]:
    return {variant.name: variant for variant in ops.variants(op)}


def illegal(trial: Trial) -> str | None:
    """Why a call could not use the row today, or None; by what `plan` asks of a row."""
    if (where := target.targets().get(trial.target)) is None:
        return f"configs/targets.yaml has no {trial.target}"
    return plan._rows(trial.problem, where)[1](trial.config)


def source_hash(trial: Trial) -> str:
    """That of the kernel which today's template gives for the row, compiled by the row's compiler."""
    variant, where = variants(trial.op)[trial.variant], target.by_name(trial.target)
    if variant.host is not None:
        return _source_hash(variant, trial.problem, where, trial.config)
    source = variant.sources(trial.problem, where, trial.config)[0]
    return dataclasses.replace(source, toolchain_version=trial.toolchain).key[:16]


def foreign(root: Path, now: Templates) -> Iterator[tuple[str, Trial]]:
    """(where it stands, row) of rows that claim the current revision and have another kernel than it gives."""
    for path in files(root):
        for place, trial in trials(path):
            current = trial.revision == now.get(trial.op, {}).get(trial.variant, {}).get("revision")
            if current and illegal(trial) is None and trial.source_hash not in ("", source_hash(trial)):
                yield place, trial


def bad_rows(root: Path, now: Templates, before: Templates) -> Iterator[str]:
    """What is wrong with the shipped rows, a line each."""
    for path in files(root):
        if path.stem not in ops.OPS:
            yield f"{path.parent.name}/{path.name} is of no op; there is {', '.join(ops.OPS)}"
            continue
        yield from (f"{path.parent.name}/{path.name}, {fault}" for fault in shipped.check(path))
        for place, trial in trials(path):
            if (reason := illegal(trial)) is not None:
                yield f"{place}: illegal today, {reason}; measure it again or leave it out"
                continue
            new, old = now[trial.op][trial.variant], before.get(trial.op, {}).get(trial.variant, {})
            if trial.revision > new["revision"]:
                yield f"{place}: claims revision {trial.revision}, {trial.variant} is at {new['revision']}"
            elif trial.revision == old.get("revision") == new["revision"] and old["sha256"] != new["sha256"]:
                yield f"{place}: claims revision {trial.revision}, whose template was another; see the variant's fault"
    for place, trial in foreign(root, now):
        if trial.source_hash not in before.get(trial.op, {}).get(trial.variant, {}).get("alike", ()):
            yield (
                f"{place}: claims today's revision, but its source_hash is of another kernel. Measure it again, or, if "
                f"what has changed since cannot alter times, record that: {RECORD}"
            )


# ------------------------------------------------------------------------------------------------------------- of today


def test_every_change_of_a_template_is_recorded() -> None:
    assert list(changes(today(), recorded())) == []


def test_every_shipped_row_is_legal_and_of_the_revision_that_it_claims() -> None:
    found = list(bad_rows(ROOT, today(), recorded()))
    assert not found, f"{len(found)} faults, the first: {found[:10]}"


# ------------------------------------------------------------------------------------------------ what would be noticed


def read_instead(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Templates are read from files of this directory, where it has one of the same name."""
    real = triton.closure

    def closure(path: str, function: str) -> str:
        other = directory / Path(path).name
        return real(str(other) if other.exists() else path, function)

    patch.setattr(triton, "closure", closure)


def test_nothing_of_the_machine_is_in_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler, another place of the file, other line numbers."""
    before = today()
    for path in Path(splitk.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_text("# a line\n\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    read_instead(monkeypatch, tmp_path)
    monkeypatch.setattr(triton, "version", lambda: "triton 0.0")
    assert today() == before


@pytest.mark.parametrize(("file", "old", "new", "changed"), [
    ("triton_combine.py", "# an online softmax over pieces", "#", {"decode_splitk_triton", "decode_splitk_gluon"}),
    ("triton_splitk.py", "tl.trans(k_pe), s)", "tl.trans(k_pe), s) + 0", {"decode_splitk_triton"}),
    ("gluon_splitk.py", "def decode_splitk_gluon(", "def decode_splitk_gluon(\n    # here\n", {"decode_splitk_gluon"}),
], ids=["of the combine, which is of both", "of the first kernel", "of Gluon's"])  # fmt: skip
def test_a_changed_template_is_told(
    file: str, old: str, new: str, changed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = today()
    source = Path(splitk.__file__).with_name(file).read_text(encoding="utf-8")
    assert old in source
    (tmp_path / file).write_text(source.replace(old, new), encoding="utf-8")
    read_instead(monkeypatch, tmp_path)
    told = list(changes(today(), before))
    assert {line.partition(":")[0] for line in told} & {"decode_splitk_triton", "decode_splitk_gluon"} == changed
    assert all("Raise `revision`" in line and RECORD in line for line in told)


def test_a_host_variant_is_its_module() -> None:
    assert text(blocked_cpu.DECODE_BLOCKED_CPU) == Path(blocked_cpu.__file__).read_text(encoding="utf-8")


def test_revisions_go_up_and_are_recorded() -> None:
    now = {"decode": {"a": {"revision": 2, "sha256": "x"}, "b": {"revision": 1, "sha256": "y"}}}
    assert list(changes(now, now)) == []
    before = {"decode": {"a": {"revision": 1, "sha256": "w"}, "c": {"revision": 1, "sha256": "z"}}}
    told = list(changes(now, before))
    assert [line.partition(";")[0] for line in told] == [
        "c is no variant of decode any more", "a: its revision was raised to 2", "b is not recorded",
    ]  # fmt: skip
    both = {"decode": before["decode"] | now["decode"]}
    assert any("a: its revision fell from 2 to 1" in line for line in changes(before, both))


HOPPER = target.by_name("sm_90")
PROBLEM = DecodeProblem(num_heads=16, batch=4, hinted=True)
CONFIG = splitk.default(PROBLEM, HOPPER).replace(num_kv_splits=7)
NOW = splitk.DECODE_SPLITK_TRITON.revision


def row(config: Config = CONFIG, **fields: Any) -> Trial:
    """A good row, compiled by a Triton that is not the installed one."""
    usual: dict[str, Any] = {"problem": PROBLEM, "target": "sm_90", "device": HOPPER.device, "revision": NOW,
                             "median_us": 10.0, "toolchain": "triton 3.6.0"}  # fmt: skip
    trial = Trial(config=config, **(usual | fields))
    if "source_hash" in fields or trial.target != "sm_90" or illegal(trial) is not None:
        return trial
    return dataclasses.replace(trial, source_hash=source_hash(trial))


def plain() -> Templates:
    """A record of what there is now, without other kernels."""
    return {op: {name: new | {"alike": []} for name, new in variants.items()} for op, variants in today().items()}


def ship(root: Path, *rows: Trial) -> Path:
    path = root / "tuning_db" / "nvidia_h200" / "decode.jsonl"
    shipped.export(rows, path)
    return path


ON_CPU = DecodeProblem(num_heads=4, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32", hinted=True)
BAD: dict[str, tuple[Callable[[], Trial], str]] = {
    "newer than its variant": (lambda: row(revision=NOW + 1), f"claims revision {NOW + 1}, decode_splitk_triton is at"),
    "another kernel": (lambda: row(source_hash="0123456789abcdef"), "its source_hash is of another kernel"),
    "predicted of another": (lambda: row(source_hash="0" * 16, provenance="predicted"), "of another kernel"),
    "imported of another": (lambda: row(source_hash="0" * 16, provenance="imported"), "of another kernel"),
    "illegal": (lambda: row(CONFIG.replace(combine_d=512, combine_s=128)), "illegal today, a tile of"),
    "of a page that it cannot copy": (
        lambda: row(problem=dataclasses.replace(PROBLEM, page_size=16)), "illegal today, page size 16"
    ),
    "a tunable less": (lambda: row(Config.of(splitk.NAME, block_m=16)), "decode_splitk_triton has other tunables"),
    "no such variant": (lambda: row(Config.of("decode_gone", a=1)), "illegal today, there is no variant decode_gone"),
    "no such target": (lambda: row(target="sm_0"), "illegal today, configs/targets.yaml has no sm_0"),
    "another device's": (lambda: row(device="Device 2"), "line 1: belongs to device_2/decode.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told(name: str, tmp_path: Path) -> None:
    made, fault = BAD[name]
    ship(tmp_path, made())
    (found,) = bad_rows(tmp_path, today(), plain())
    assert found.startswith("nvidia_h200/decode.jsonl, line 1: ")
    assert fault in found


PROMPT = PrefillProblem(num_heads=16, num_kv_heads=16, **PrefillProblem.sizes(2, 1024, 4096))


def prompt_row(config: Config | None = None, **fields: Any) -> Trial:
    """A good row of a prompt."""
    variant = variants("prefill")["prefill_triton"]
    usual = {"problem": PROMPT, "revision": variant.revision}
    return row(config or variant.default(PROMPT, HOPPER), **(usual | fields))


BAD_PROMPTS: dict[str, tuple[Callable[[], Trial], str]] = {
    "newer than its variant": (lambda: prompt_row(revision=9), "claims revision 9, prefill_triton is at"),
    "another kernel": (lambda: prompt_row(source_hash="0123456789abcdef"), "its source_hash is of another kernel"),
    "illegal": (
        lambda: prompt_row(prompt_row().config.replace(num_stages=9)), "illegal today, the tiles take"
    ),
    "of tensors that it cannot copy": (
        lambda: prompt_row(problem=dataclasses.replace(PROMPT, misaligned=("k",))), "no bulk tensor copies"
    ),
    "a tunable less": (lambda: prompt_row(Config.of("prefill_triton", block_m=64)), "has other tunables"),
    "no such variant": (lambda: prompt_row(Config.of("prefill_gone", a=1)), "there is no variant prefill_gone"),
    "a decode": (lambda: row(), "line 1: belongs to nvidia_h200/decode.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_row_of_a_prompt_is_told(name: str, tmp_path: Path) -> None:
    made, fault = BAD_PROMPTS[name]
    shipped.export([made()], tmp_path / "tuning_db" / "nvidia_h200" / "prefill.jsonl")
    (found,) = bad_rows(tmp_path, today(), plain())
    assert found.startswith("nvidia_h200/prefill.jsonl, line 1: ")
    assert fault in found


@pytest.mark.parametrize("name", [variant.name for variant in ops.variants("prefill") if variant.host is None])
def test_rows_of_prompts_are_of_the_template_that_they_claim(name: str, tmp_path: Path) -> None:
    """Good today; told when the template changes in silence; taken as alike when that is recorded."""
    variant = variants("prefill")[name]
    good = prompt_row(variant.default(PROMPT, HOPPER), revision=variant.revision)
    path = tmp_path / "tuning_db" / "nvidia_h200" / "prefill.jsonl"
    shipped.export([good], path)
    assert good.source_hash
    assert list(bad_rows(tmp_path, today(), plain())) == []
    before = plain()
    before["prefill"][name] |= {"sha256": "of another text"}
    (found,) = bad_rows(tmp_path, today(), before)
    assert f"claims revision {variant.revision}, whose template was another" in found
    shipped.export([dataclasses.replace(good, source_hash="0" * 16)], path)
    golden = tmp_path / "templates.json"
    record(tmp_path, golden)
    assert json.loads(golden.read_text())["prefill"][name]["alike"] == ["0" * 16]
    assert list(bad_rows(tmp_path, today(), json.loads(golden.read_text()))) == []


def test_good_rows_are_not_told(tmp_path: Path) -> None:
    """What the current templates give, whatever compiled it; what an older revision gave; rows without a hash."""
    host = blocked_cpu.DECODE_BLOCKED_CPU
    cpu = target.by_name("cpu")
    config = host.default(ON_CPU, cpu)
    here = {"target": "cpu", "device": cpu.device, "source_hash": _source_hash(host, ON_CPU, cpu, config)}
    on_cpu = Trial(problem=ON_CPU, config=config, revision=host.revision, median_us=1.0, **here)
    path = ship(tmp_path, row(), row(revision=NOW - 1, source_hash="0" * 16, provenance="imported"),
                row(CONFIG.replace(num_kv_splits=9), source_hash=""))  # fmt: skip
    shipped.export([on_cpu], path.parents[1] / "cpu" / "decode.jsonl")
    (path.parent / "peers_decode.jsonl").write_text("{}\n")
    assert list(bad_rows(tmp_path, today(), plain())) == []


def test_rows_of_a_template_that_changed_in_silence_are_told(tmp_path: Path) -> None:
    ship(tmp_path, row(), row(revision=NOW - 1, provenance="imported"))
    before = plain()
    before["decode"][splitk.NAME] |= {"sha256": "of another text"}
    (found,) = bad_rows(tmp_path, today(), before)
    assert f"claims revision {NOW}, whose template was another" in found


def test_a_line_that_is_no_row_and_a_file_of_no_op_are_told(tmp_path: Path) -> None:
    path = ship(tmp_path, row())
    with path.open("a") as file:
        file.write('{"problem": {"op": "decode", "num_heads": 0}}\n')
    (path.parent / "decodes.jsonl").write_text("")
    told = list(bad_rows(tmp_path, today(), plain()))
    assert [line.partition(": ")[0] for line in told] == [
        "nvidia_h200/decode.jsonl, line 2", "nvidia_h200/decodes.jsonl is of no op; there is decode, prefill",
    ]  # fmt: skip


def test_recording_takes_the_rows_of_another_text_that_are_shipped_now_and_no_others(tmp_path: Path) -> None:
    golden = tmp_path / "templates.json"
    old, other = row(source_hash="0" * 16), row(CONFIG.replace(num_kv_splits=9), source_hash="1" * 16)
    ship(tmp_path, row(CONFIG.replace(num_kv_splits=8)), old, row(other.config, revision=NOW - 1, source_hash="2" * 16))
    record(tmp_path, golden)
    written = json.loads(golden.read_text())
    assert written["decode"][splitk.NAME] == today()["decode"][splitk.NAME] | {"alike": ["0" * 16]}
    assert list(bad_rows(tmp_path, today(), written)) == []
    ship(tmp_path, old, other)
    (found,) = bad_rows(tmp_path, today(), written)
    assert found.startswith("nvidia_h200/decode.jsonl, line 2: ")
    record(tmp_path, golden)
    assert list(bad_rows(tmp_path, today(), json.loads(golden.read_text()))) == []
    ship(tmp_path, row())
    record(tmp_path, golden)
    assert json.loads(golden.read_text())["decode"][splitk.NAME]["alike"] == []


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(f"usage: {RECORD}")
    record()
