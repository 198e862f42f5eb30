"""The page about a tuning database: what is on it, that it stands alone, that nothing in a row can become markup."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
from click.testing import CliRunner, Result

from mla_jit import plan, target
from mla_jit.cli import main
from mla_jit.config import Config
from mla_jit.problem import DecodeProblem, PrefillProblem
from mla_jit.tuning import bench, report, store
from mla_jit.tuning.rows import FAULTS, Trial

ROOT = Path(__file__).parents[2]
HOPPER = target.targets()["sm_90"]
EVIL = "<script>alert('note')</script> & \"<b>bold</b>\""
VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclasses.dataclass
class Node:
    """An element of a page."""

    tag: str
    attrs: dict[str, str]
    parts: list[Node | str] = dataclasses.field(default_factory=list)

    def all(self, tag: str) -> Iterator[Node]:
        for part in self.parts:
            if isinstance(part, Node):
                if tag in ("*", part.tag):
                    yield part
                yield from part.all(tag)

    def one(self, tag: str, **attrs: str) -> Node:
        (found,) = (n for n in self.all(tag) if attrs.items() <= n.attrs.items())
        return found

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


class Reader(HTMLParser):
    """Builds the tree; fails on an element that is not closed, or closed out of turn."""

    def __init__(self, page: str):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attrs) == len(attrs), f"<{tag}> has an attribute twice"
        self.open[-1].parts.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def problem(heads: int = 16, batch: int = 1, kv: int = 1024, **fields: object) -> DecodeProblem:
    return DecodeProblem(num_heads=heads, batch=batch, max_kv_len=kv, hinted=True, **fields)  # type: ignore[arg-type]


PROBLEMS = [problem(*sizes) for sizes in itertools.product((16, 128), (1, 64), (1024, 16384))]
SPLITS = (203, 205, 207, 209)  # no default has these
BROKEN = problem(16, 4, 4096)  # of which nothing ran


def default(of: DecodeProblem) -> Config:
    return plan.analytic(of, HOPPER).config


def trial(of: DecodeProblem, config: Config, median_us: float | None = 10.0, **fields: object) -> Trial:
    given: dict[str, object] = {
        "target": HOPPER.name, "device": HOPPER.device, "revision": 2, "spread_us": 0.02, "registers": 200,
        "spill_bytes": 16, "smem_bytes": 167968, "toolchain": "triton 3.6.0", "driver": "580.1", "torch": "2.11",
        "policy": "v1", "command": "mla-tune run --model deepseek-v3", "created": "2026-11-24T02:30:44+00:00", **fields,
    }  # fmt: skip
    given["spread_us"] = None if median_us is None else given["spread_us"]
    return Trial(problem=of, config=config, median_us=median_us, **given)  # type: ignore[arg-type]


def failed(of: DecodeProblem, config: Config, status: str, note: str) -> Trial:
    return trial(of, config, None, status=status, note=note, effort=0, registers=None, spill_bytes=None)


def tuned(of: DecodeProblem) -> list[Trial]:
    """The default at 20 µs, others faster by fewer splits, in a playoff; and a few short measurements."""
    first = default(of)
    found = [trial(of, first, 20.0)]
    for i, (splits, block_n) in enumerate(itertools.product(SPLITS, (32, 64))):
        effort = 2 if i < 3 else 0
        found.append(trial(of, first.replace(num_kv_splits=splits, block_n=block_n), 12.0 + i / 2, effort=effort))
    return found


@pytest.fixture(scope="module")
def rows() -> list[Trial]:
    found = [row for of in PROBLEMS for row in tuned(of)]
    for i, status in enumerate(FAULTS):  # one of each kind, on a block that no other has
        config = default(PROBLEMS[i % 8]).replace(num_kv_splits=11 + i, block_n=128)
        found.append(failed(PROBLEMS[i % 8], config, status, f"planted {status}: {EVIL}"))
    found += [failed(BROKEN, default(BROKEN).replace(num_kv_splits=s), "hang", "no answer in 60 s") for s in (1, 2, 3)]
    return found


@pytest.fixture(scope="module")
def database(rows: list[Trial], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "tuning.db"
    with store.Store(path) as opened:
        assert opened.add(rows) == len(rows)
    return path


def page_of(rows: list[Trial], path: Path) -> str:
    """By way of a database, as the verb makes it."""
    with store.Store(path) as opened:
        opened.add(rows)
        return report.html(opened.trials(), opened.best(), target.targets(), database="tuning.db")


@pytest.fixture(scope="module")
def page(database: Path) -> str:
    return page_of([], database)


@pytest.fixture(scope="module")
def tree(page: str) -> Node:
    return Reader(page).root


def table(tree: Node) -> list[dict[str, str]]:
    """The table of all shapes: the cells' texts by the heads of their columns, and the configs under them."""
    found = tree.one("table", id="all")
    heads = [head.text for head in found.all("th")]
    lines = []
    for body in found.all("tbody"):
        first, *second = ([cell.text.strip() for cell in line.all("td")] for line in body.all("tr"))
        lines.append(dict(zip(heads, first, strict=True)) | {"configs": "".join(itertools.chain(*second))})
    return lines


def shape_of(rows: list[Trial], best: Trial | None) -> report.Shape:
    (found,) = report.shapes(rows, [best] if best else [], target.targets())
    return found


# ----------------------------------------------------------------------------------------------------- what is on it


def test_every_shape_is_there(tree: Node) -> None:
    lines = table(tree)
    assert len(lines) == len(PROBLEMS) + 1
    names = {line["shape"] for line in lines}
    assert "128 heads · batch 64 · kv 16384" in names
    assert len(names) == len(lines)
    titles = [cell.attrs.get("title", "") for cell in tree.one("table", id="all").all("td")]
    for of in (*PROBLEMS, BROKEN):
        assert any(title.startswith(f"{of};") for title in titles)
    (broken,) = (line for line in lines if line["best"] == "none ran")
    assert (broken["shape"], broken["faults"]) == ("16 heads · batch 4 · kv 4096", "3")


def test_a_shape_says_its_best_its_default_and_its_runner_up(tree: Node) -> None:
    (line,) = (line for line in table(tree) if line["shape"] == "16 heads · batch 64 · kv 1024")
    first = default(problem(16, 64, 1024))
    best, rival = (first.replace(num_kv_splits=203, block_n=n) for n in (32, 64))
    assert line["configs"] == f"{best}runner-up 12.50 µs: {rival}"
    wanted = {
        "best": "12.00", "spread": "0.02", "default": "20.00", "gain": "1.667", "gap": "4.2 %", "effort": "2",
        "provenance": "measured", "registers": "200", "spills": "16", "shared": "167968", "faults": "1",
    }  # fmt: skip
    assert {name: line[name] for name in wanted} == wanted


def test_every_fault_is_named_under_its_status(tree: Node, rows: list[Trial]) -> None:
    heads = [head.text for head in tree.all("h3")]
    assert heads == [f"{status} ({4 if status == 'hang' else 1})" for status in FAULTS]
    lines = [tuple(cell.text for cell in line.all("td")) for line in tree.all("tr")]
    for bad in (row for row in rows if row.median_us is None):
        assert any(line[:1] == (str(bad.config),) and bad.note in line for line in lines), bad.config


def test_the_head_says_where_the_rows_come_from(tree: Node, rows: list[Trial]) -> None:
    sums = [line.text for line in tree.one("ul", **{"class": "sums"}).all("li")]
    faults = len(FAULTS) + 3
    assert sums[:3] == [f"{len(PROBLEMS) + 1}shapes", f"{len(rows)}trials", f"{faults}faults"]
    assert sums[3] == "1.667default ÷ best, geometric mean of 8"
    head = tree.one("dl").text
    for part in ("NVIDIA H200", "triton 3.6.0", "580.1", "2.11", "2026-11-24", "mla-tune run --model deepseek-v3"):
        assert part in head
    assert "kv_lora_rank 512" in head


def test_the_plots_tell_each_shape(tree: Node) -> None:
    roof, gains, *maps = tree.all("svg")
    points = [title.text for title in roof.all("title")]
    assert len(points) == len(PROBLEMS)
    (point,) = (text for text in points if text.startswith("128 heads · batch 64 · kv 16384\n"))
    rate = 2 * 2**20 * 128 * (576 + 512) / 12 * 1e-6  # the times are made up, so it is beyond the roof
    assert f"12.00 µs, {rate:.2f} TFLOP/s" in point
    assert "762 TFLOP/s" in roof.text
    assert "4500 GB/s" in roof.text
    assert len(list(gains.all("title"))) == len(PROBLEMS)
    assert [option.text for option in tree.one("select").all("option")] == [
        caption.text.partition(":")[0] for caption in tree.all("figcaption") if "measurements" in caption.text
    ]
    assert len(maps) == len(PROBLEMS)


def test_a_cell_of_the_map_has_the_best_time_of_its_configs(tmp_path: Path) -> None:
    of = PROBLEMS[0]
    first = default(of)
    rows = tuned(of)
    rows.append(trial(of, first.replace(num_kv_splits=207, block_n=32, lazy=False), 3.0, effort=0))
    # the longer measurement of the same config counts
    rows.append(trial(of, first.replace(num_kv_splits=203, block_n=32), 1.0, effort=0))
    rows.append(trial(of, first.replace(num_kv_splits=205, block_n=32), 0.5, revision=1))
    rows.append(trial(of, first.replace(num_kv_splits=205, block_n=32), 0.4, provenance="predicted"))
    rows.append(failed(of, first.replace(num_kv_splits=9, block_n=32), "hang", ""))
    *_, shown = Reader(page_of(rows, tmp_path / "t.db")).root.all("svg")
    cells = {title.text.split("\n")[0]: title.text.split("\n", 1)[1] for title in shown.all("title")}
    block = f"{first.variant}, block {first['block_m']} × 32"
    assert cells[f"{block}, 207 splits"].startswith("3.00 µs, 1.000 × the best of the map, of 2 configs; ")
    assert cells[f"{block}, 203 splits"].startswith("12.00 µs, 4.000 ×")
    assert cells[f"{block}, 205 splits"].startswith("13.00 µs")
    assert cells[f"{block}, 9 splits"] == "failed: 1 hang"
    texts = [node.text for node in shown.all("text")]
    assert texts.count("3.0") == 1
    assert texts.count("×") == 1


def test_few_trials_make_no_map_and_predictions_are_no_measurements(tmp_path: Path) -> None:
    of = PROBLEMS[0]
    rows = [trial(of, default(of).replace(num_kv_splits=n), 5.0 + n, provenance="predicted") for n in range(1, 9)]
    tree = Reader(page_of(rows, tmp_path / "t.db")).root
    (line,) = table(tree)
    assert (line["best"], line["provenance"], line["default"], line["of roof"]) == ("6.00", "predicted", "", "")
    assert list(tree.all("svg")) == []
    assert "Nothing was measured." in tree.text


def test_devices_are_told_apart_and_a_target_that_is_no_more_has_no_roof(tmp_path: Path) -> None:
    of = PROBLEMS[0]
    rows = [*tuned(of), trial(of, default(of), 33.0, target="sm_1", device="Old Device")]
    tree = Reader(page_of(rows, tmp_path / "t.db")).root
    names = [line["shape"] for line in table(tree)]
    assert names == [
        "16 heads · batch 1 · kv 1024 · NVIDIA H200 (sm_90)", "16 heads · batch 1 · kv 1024 · Old Device (sm_1)"
    ]  # fmt: skip
    assert "sm_1: configs/targets.yaml has no such target" in tree.text
    assert [line["of roof"] != "" for line in table(tree)] == [True, False]


def test_shapes_that_differ_in_anything_have_names_that_do() -> None:
    base = problem(16, 64, 4096)
    others = [
        base, problem(16, 64, 4096, lse=True), problem(16, 64, 4096, kv_dtype="fp8_e4m3"),
        problem(16, 64, 4096, total_kv=1000), problem(16, 64, 4096, index64=("block_table", "seq_lens")),
    ]  # fmt: skip
    labels, common = report._labels(others)
    assert len(set(labels.values())) == len(others)
    assert labels[others[1]] == "16 heads · batch 64 · kv 4096 · cache bf16 · lse · index64 none · total_kv none"
    assert "q_dtype bf16" in common
    assert "cache" not in common


def test_prompts_stand_beside_decodes(tmp_path: Path) -> None:
    sizes = PrefillProblem.sizes(2, 1024, 4096)
    prompt = PrefillProblem(num_heads=16, num_kv_heads=16, **sizes)
    full = dataclasses.replace(prompt, causal=False)
    tiles = plan.analytic(prompt, HOPPER).config
    rows = [trial(of, tiles.replace(block_n=n), us) for of in (prompt, full) for n, us in ((64, 50.0), (128, 60.0))]
    tree = Reader(page_of([*tuned(PROBLEMS[0]), *rows], tmp_path / "t.db")).root
    names = [line["shape"] for line in table(tree)]
    assert len(names) == len(set(names)) == 3
    assert [("prefill" in name, "qk_dim" in name, "page_size" in name) for name in names] == [
        (False, False, True), (True, True, False), (True, True, False),
    ]  # fmt: skip
    shapes = {s.problem: s for s in report.shapes(rows, [rows[0], rows[2]], target.targets())}
    pairs = 2 * 1024 * (3072 + 1025 / 2)
    assert shapes[prompt].flops == pytest.approx(2 * 16 * (192 + 128) * pairs)
    assert shapes[full].flops == 2 * 16 * (192 + 128) * 2 * 1024 * 4096
    assert shapes[full].bytes == 2 * 16 * (192 + 128) * 2 * (1024 + 4096)
    assert shapes[full].tokens == 2048
    assert shapes[full].of_roof == pytest.approx(shapes[full].flops / HOPPER.bf16_tflops * 1e-6 / 50.0)


# -------------------------------------------------------------------------------------------------------- its numbers


@pytest.mark.parametrize(
    ("of", "lens"),
    [
        (problem(16, 64, 4096), (4096,) * 64),
        (problem(128, 3, 1024, q_len=2, kv_dtype="fp8_e4m3"), (1024,) * 3),
        (problem(8, 2, 4096, total_kv=5000), (2500, 2500)),
    ],
    ids=str,
)
def test_the_roof_is_that_of_the_bench(of: DecodeProblem, lens: tuple[int, ...]) -> None:
    row = trial(of, Config.of("any"), 40.0)
    grid = bench.Shape(of.num_heads, lens, of.q_len, dtype=of.kv_dtype)
    wanted = bench.roof_us(grid, HOPPER.bandwidth_gbps, HOPPER.bf16_tflops) / 40.0
    assert shape_of([row], row).of_roof == pytest.approx(wanted, rel=1e-12)


def test_where_the_defaults_time_is_from() -> None:
    of = PROBLEMS[0]
    first = default(of)
    best = trial(of, first.replace(num_kv_splits=2), 10.0)
    short, playoff = trial(of, first, 14.0, effort=0), trial(of, first, 15.0)
    told = dataclasses.replace(best, default_us=16.0)
    assert shape_of([best], best).default is None
    assert shape_of([best], best).gain is None
    assert shape_of([best, short], best).default == (14.0, 0)
    assert shape_of([best, short, playoff], best).default == (15.0, 2)
    assert shape_of([told, short, playoff], told).default == (16.0, 2)
    assert shape_of([told, short, playoff], told).gain == 1.6
    assert shape_of([short, playoff], playoff).gain == 1.0


def test_the_runner_up_is_of_the_same_effort_and_without_a_fault() -> None:
    of = PROBLEMS[0]
    configs = [default(of).replace(num_kv_splits=n) for n in range(1, 7)]
    best = trial(of, configs[0], 10.0, spread_us=0.4)
    rows = [
        best, trial(of, configs[1], 10.05, effort=1), trial(of, configs[2], 10.06), trial(of, configs[3], 10.5),
        failed(of, configs[2], "wrong", "rel L2 0.5"), trial(of, configs[4], 10.01, revision=1),
        trial(of, configs[5], 10.02, provenance="predicted"),
    ]  # fmt: skip
    found = shape_of(rows, best)
    assert found.runner_up == rows[3]
    assert found.gap == pytest.approx(0.05)
    assert not found.tied
    assert shape_of([best, trial(of, configs[3], 10.09)], best).tied


# ----------------------------------------------------------------------------------------------------- it stands alone


def test_nothing_is_fetched(page: str, tree: Node) -> None:
    for node in tree.all("*"):
        for name, value in node.attrs.items():
            if name.rpartition(":")[2] in ("src", "href", "srcset", "data", "action", "poster", "background"):
                assert value.startswith("#"), f"<{node.tag} {name}={value}>"
    assert {node.tag for node in tree.all("*")} & {"link", "img", "iframe", "object", "embed", "image", "base"} == set()
    assert re.findall(r"https?:|@import|//[a-z]", page) == []
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    policy = tree.one("meta", **{"http-equiv": "Content-Security-Policy"}).attrs["content"]
    assert policy.startswith("default-src 'none'")


def test_ids_are_unique_and_what_is_referred_to_is_there(page: str, tree: Node) -> None:
    ids = [node.attrs["id"] for node in tree.all("*") if "id" in node.attrs]
    assert len(set(ids)) == len(ids)
    referred = {node.attrs["href"][1:] for node in tree.all("use")} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert referred
    assert referred <= set(ids)


def test_no_text_of_a_row_becomes_markup(tmp_path: Path) -> None:
    of = PROBLEMS[0]
    config = Config.of("<i>variant</i>\x07$x^2$", block_m="<img src=x onerror=alert(1)>", num_kv_splits=2)
    more = {"command": f"mla-tune {EVIL}", "toolchain": EVIL, "driver": EVIL, "device": "H200 </title><script>"}
    rows = [dataclasses.replace(row, **more) for row in tuned(of)]  # type: ignore[arg-type]
    rows.append(trial(of, config, 1.0, **more))  # type: ignore[arg-type]
    rows.append(failed(of, config.replace(num_kv_splits=3), "wrong", EVIL))
    page = page_of(rows, tmp_path / "t.db")
    tree = Reader(page).root
    assert [node.tag for node in tree.all("script")] == ["script"]
    assert {node.tag for node in tree.all("*")} & {"img", "i", "script>"} == set()
    assert tree.one("html").one("script") is tree.one("body").one("script")
    assert EVIL in {cell.text for cell in tree.all("td")}
    assert f"mla-tune {EVIL}" in tree.one("dl").text
    assert sum(node.text == "<i>variant</i>$x^2$" for node in tree.all("text")) == 1
    assert any(str(config) in node.text for node in tree.one("table", id="all").all("code"))


def test_the_same_rows_give_the_same_page(rows: list[Trial], page: str, database: Path, tmp_path: Path) -> None:
    """In another order, under other settings of Matplotlib, in other processes."""
    mixed = list(rows)
    random.Random(0).shuffle(mixed)
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page_of(mixed, tmp_path / "mixed.db") == page
    out = []
    for seed in ("1", "2"):
        file = tmp_path / f"{seed}.html"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "mla_jit.cli", "report", "--db", str(database), "--html", str(file)]
        subprocess.run(command, check=True, env=env, capture_output=True, timeout=120)
        out.append(file.read_text(encoding="utf-8"))
    assert out[0] == out[1] == page.replace("tuning.db", str(database))


def test_a_report_needs_no_torch() -> None:
    code = "import sys; from mla_jit.tuning import report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


# ----------------------------------------------------------------------------------------------------------- the verb


def invoke(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["report", *(str(a) for a in arguments)])
    assert done.exit_code == code, done.output
    return done


def test_the_verb_writes_the_page(rows: list[Trial], database: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("what stood there")
    done = invoke("--db", database, "--html", file)
    assert done.stdout == f"9 shapes, {len(rows)} trials, {len(FAULTS) + 3} faults; {file}\n"
    assert len(table(Reader(file.read_text(encoding="utf-8")).root)) == 9
    assert list(tmp_path.iterdir()) == [file]
    assert '"shapes": 9' in invoke("--db", database, "--html", file, "--json").stdout


def test_the_verb_takes_one_device(tmp_path: Path) -> None:
    path, file = tmp_path / "t.db", tmp_path / "page.html"
    with store.Store(path) as opened:
        opened.add([*tuned(PROBLEMS[0]), *(dataclasses.replace(t, device="Other Device") for t in tuned(PROBLEMS[1]))])
    for name in ("NVIDIA H200", "nvidia_h200"):
        assert invoke("--db", path, "--html", file, "--device", name).stdout.startswith("1 shapes, 9 trials")
    assert "Other Device" not in file.read_text(encoding="utf-8")
    done = invoke("--db", path, "--html", file, "--device", "B200", code=1)
    assert "no trials of 'B200'; it has NVIDIA H200, Other Device" in done.output


def test_what_cannot_be_done_is_said_and_leaves_nothing(database: Path, tmp_path: Path) -> None:
    file, empty = tmp_path / "page.html", tmp_path / "empty.db"
    store.Store(empty).close()
    assert "has no trials; `mla-tune run` makes some" in invoke("--db", empty, "--html", file, code=1).output
    assert "there is no tuning database" in invoke("--db", tmp_path / "no.db", "--html", file, code=1).output
    assert not file.exists()
    nowhere = tmp_path / "no" / "page.html"
    assert "cannot be written" in invoke("--db", database, "--html", nowhere, code=1).output
    assert "--html" in invoke("--db", database, code=2).output


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
@pytest.mark.parametrize("json", [False, True], ids=["text", "json"])
def test_without_the_extra_the_verb_names_it(package: str, json: bool, database: Path, tmp_path: Path) -> None:
    arguments = ["report", "--db", str(database), "--html", str(tmp_path / "page.html"), *(["--json"] if json else [])]
    code = f"import sys; sys.modules[{package!r}] = None; from mla_jit.cli import main; main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert "pip install 'mla_jit[report]'" in (done.stdout if json else done.stderr)
    assert not (tmp_path / "page.html").exists()
