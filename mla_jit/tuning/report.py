"""A tuning database as one HTML page: roofline, heat maps, gains over the default, all shapes, all faults.

The page stands alone: plots are inline SVG, style and script are its own, and nothing is fetched. The same rows give
the same page. Needs the extra `report`, and no torch. Times in µs a call.
"""

from __future__ import annotations

import collections
import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from mla_jit import __version__, plan
from mla_jit.config import Config
from mla_jit.errors import NoVariant
from mla_jit.problem import Tunable
from mla_jit.target import Target
from mla_jit.tuning.rows import FAULTS, NOISE, OK, Trial

try:
    import jinja2
    from matplotlib import style, ticker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError(f"{error}; a report needs the extra `report`: pip install 'mla_jit[report]'") from error

BANDS = (1.02, 1.05, 1.1, 1.25, 1.5, 2.0)  # a heat map's colours: up to so many times the best time, and beyond
_LINE = 0.36  # of the plot of gains, inches a shape
_ENOUGH = 6  # measured configs, in two cells at least, that make a heat map
_TOKENS = ((12, "≤ 4 Ki"), (15, "≤ 32 Ki"), (18, "≤ 256 Ki"), (21, "≤ 2 Mi"), (99, "more"))  # log2, and the legend
_ALWAYS = ("num_heads", "batch", "max_kv_len")  # in every label
# of fields, if not "name value"
_WORDS = {"op": "{}", "num_heads": "{} heads", "max_kv_len": "kv {}", "kv_dtype": "cache {}"}

# Colours of the plots are CSS variables of the page, which has them for light and for dark. Matplotlib is given a
# stand-in for each; `_svg` puts the variable in its place.
_COUNTS = {"size": len(_TOKENS), "heat": len(BANDS) + 1, "text": len(BANDS) + 1}  # text: on the heat of its number
_VARIABLES = ("ink", "faint", "grid", "paper", "point", *(f"{k}{i}" for k, n in _COUNTS.items() for i in range(n)))
_COLOUR = {name: f"#0000{i + 1:02x}" for i, name in enumerate(_VARIABLES)}
_NAMES = {colour: f"var(--{name})" for name, colour in _COLOUR.items()}
_NOT_XML = re.compile("[^\\t\\n\\r -\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
_ON_PAPER = {"facecolor": _COLOUR["paper"], "edgecolor": "none", "pad": 0.5}
_METADATA = ("Date", "Creator", "Format", "Type")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "DejaVu Sans", "font.size": 9.0,
    "text.color": _COLOUR["ink"], "axes.labelcolor": _COLOUR["ink"], "axes.edgecolor": _COLOUR["faint"],
    "xtick.color": _COLOUR["faint"], "ytick.color": _COLOUR["faint"], "xtick.labelcolor": _COLOUR["ink"],
    "ytick.labelcolor": _COLOUR["ink"], "grid.color": _COLOUR["grid"], "grid.linewidth": 0.6, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def html(trials: Iterable[Trial], best: Iterable[Trial], targets: Mapping[str, Target], *, database: str = "") -> str:
    """The page about these trials. `best` are the rows that win, as `Store.best` says, `targets` the roofs by name."""
    rows = sorted(trials, key=lambda trial: trial.to_json())
    found = shapes(rows, best, targets)
    labels, common = _labels([shape.problem for shape in found])
    several = len({(shape.target, shape.device) for shape in found}) > 1
    name = {s.key: labels[s.problem] + (f" · {s.device} ({s.target})" if several else "") for s in found}
    page = _environment().get_template("report.html.j2")
    with style.context(("default", _STYLE)):
        maps = [(name[shape.key], shape, heat_map(shape)) for shape in found if enough(shape)]
        return page.render(
            version=__version__, database=database, common=common, facts=_facts(rows), shapes=found, name=name,
            trials=len(rows), failed=sum(trial.status != OK for trial in rows), maps=maps, bands=BANDS,
            roofs=_roofs(found), faults=_faults(found, name), roofline=roofline(found, name), gains=gains(found, name),
            mean_gain=_mean_gain(found), compared=sum(shape.gain is not None for shape in found),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what rows say


@dataclass(frozen=True)
class Shape:
    """A problem on a device, and what its trials say of it. `row` is its target's, None where there is none by now."""

    problem: Tunable
    target: str
    device: str
    row: Target | None
    trials: tuple[Trial, ...]
    best: Trial | None

    @property
    def key(self) -> tuple[Tunable, str, str]:
        return self.problem, self.target, self.device

    @cached_property
    def faults(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.status != OK)

    @cached_property
    def measured(self) -> tuple[Trial, ...]:
        """The good trials that are no predictions; of each variant those of its newest revision."""
        good = [t for t in self.trials if t.median_us is not None and t.provenance != "predicted"]
        newest = {t.variant: max(o.revision for o in good if o.variant == t.variant) for t in good}
        return tuple(t for t in good if t.revision == newest[t.variant])

    @property
    def time_us(self) -> float | None:
        """The best config's time, if it was measured."""
        return None if self.best is None or self.best.provenance == "predicted" else self.best.median_us

    @cached_property
    def default(self) -> tuple[float, int] | None:
        """(the default's time, its effort): as the best row has it, else its own trial, if any of the same effort."""
        if self.best is None or self.time_us is None:
            return None
        if self.best.default_us is not None:
            return self.best.default_us, self.best.effort
        config = self._default_config()
        timed = [(-t.effort, t.median_us) for t in self.measured if t.config == config and t.median_us is not None]
        same = [(effort, us) for effort, us in timed if -effort == self.best.effort]
        effort, us = min(same or timed, default=(0, None))
        return None if us is None else (us, -effort)

    def _default_config(self) -> Config | None:
        try:
            return None if self.row is None else plan.analytic(self.problem, self.row).config
        except NoVariant:
            return None

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default the best config is."""
        return self.default[0] / self.time_us if self.default and self.time_us else None

    @cached_property
    def runner_up(self) -> Trial | None:
        """The fastest other config of those measured with as much effort as the best."""
        faulty = {t.config for t in self.faults}
        best = self.best
        rivals = [
            t for t in self.measured
            if best is not None and t.effort == best.effort and t.config != best.config and t.config not in faulty
        ]  # fmt: skip
        return min(rivals, key=lambda t: (t.median_us or 0.0, t.config.to_json()), default=None)

    @property
    def gap(self) -> float | None:
        """How much slower the runner-up is, as a part of the best time; negative where the noise hides which it is."""
        rival = self.runner_up
        return rival.median_us / self.time_us - 1 if rival and rival.median_us and self.time_us else None

    @property
    def tied(self) -> bool:
        """Whether the noise hides which of the best and the runner-up is faster."""
        rival, best = self.runner_up, self.best
        if rival is None or best is None or rival.median_us is None or best.median_us is None:
            return False
        noise_us = NOISE * max(rival.spread_us or 0.0, best.spread_us or 0.0)
        return rival.median_us - best.median_us <= noise_us

    @property
    def tokens(self) -> int:
        """Of all sequences as they were timed: cached ones of decode, query tokens of prompts."""
        return self.problem.tokens

    @property
    def bytes(self) -> int:
        """The cache, read once; q, K, V and output of prompts."""
        return self.problem.data_bytes

    @property
    def flops(self) -> int:
        return self.problem.flops

    @property
    def tflops(self) -> float | None:
        """Achieved by the best config, TFLOP/s."""
        return self.flops / self.time_us * 1e-6 if self.time_us else None

    @property
    def of_roof(self) -> float | None:
        """The part of the attainable rate that is achieved."""
        if self.row is None or not self.time_us:
            return None
        roof_us = max(self.bytes / self.row.bandwidth_gbps * 1e-3, self.flops / self.row.bf16_tflops * 1e-6)
        return roof_us / self.time_us


def shapes(trials: Sequence[Trial], best: Iterable[Trial], targets: Mapping[str, Target]) -> list[Shape]:
    """The trials by problem and device, sorted; a shape of which nothing ran has no best."""
    groups: dict[tuple[Tunable, str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.problem, trial.target, trial.device), []).append(trial)
    winners = {(trial.problem, trial.target, trial.device): trial for trial in best}
    found = [
        Shape(*key, targets.get(key[1]), tuple(rows), winners.get(key)) for key, rows in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda s: (s.device, s.target, *_sizes(s.problem), str(s.problem.fields())))


def _sizes(p: Tunable) -> tuple[Any, ...]:
    return p.op, p.q_dtype, p.kv_dtype, p.num_heads, p.q_len, p.batch, p.max_kv_len


def _labels(problems: Sequence[Tunable]) -> tuple[dict[Tunable, str], str]:
    """A short name of each problem, different for different ones, and what all have in common."""
    fields = {problem: problem.fields() for problem in problems}
    names = list(dict.fromkeys(name for f in fields.values() for name in f))  # of several ops: not all have each
    varying = [name for name in names if len({f.get(name) for f in fields.values()}) > 1 and name not in _ALWAYS]
    labels = {
        p: " · ".join(_words(name, f[name]) for name in (*_ALWAYS, *varying) if name in f) for p, f in fields.items()
    }
    first = next(iter(fields.values()), {})
    same = [name for name in names if name not in (*_ALWAYS, *varying) and first.get(name) not in (None, False, ())]
    return labels, ", ".join(_words(name, first[name]) for name in same)


def _words(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    text = "+".join(value) if isinstance(value, tuple) else value
    return _WORDS.get(name, f"{name} {{}}").format("none" if text in (None, "") else text)


def _facts(trials: Sequence[Trial]) -> list[tuple[str, list[str]]]:
    """What the rows say of their origin: a name, and the values with the number of their rows."""
    found = []
    for name in ("device", "target", "toolchain", "driver", "torch", "provenance", "policy", "command"):
        counts = collections.Counter(str(getattr(trial, name)) for trial in trials)
        missing = counts.pop("", 0)
        values = [f"{value} ({count} trials)" if len(counts) > 1 or missing else value
                  for value, count in sorted(counts.items())]  # fmt: skip
        found.append((name, values + ([f"not recorded ({missing} trials)"] if missing else [])))
    days = sorted({trial.created[:10] for trial in trials if trial.created})
    found.append(("dates", [days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"] if days else ["not recorded"]))
    return found


def _faults(found: Sequence[Shape], name: Mapping[Any, str]) -> list[tuple[str, list[tuple[str, Trial]]]]:
    """By status the trials that failed, each with its shape's name."""
    bad = [(name[shape.key], trial) for shape in found for trial in shape.faults]
    bad.sort(key=lambda row: str(row[1].config))
    groups = [(status, [row for row in bad if row[1].status == status]) for status in FAULTS]
    return [(status, rows) for status, rows in groups if rows]


def _roofs(found: Sequence[Shape]) -> list[str]:
    """What the roofs are, a line a target and device."""
    lines = {}
    for s in found:
        if s.row is None:
            line = f"{s.target}: configs/targets.yaml has no such target, so no roof is drawn"
        else:
            line = f"{s.target}: {s.row.bandwidth_gbps:g} GB/s and {s.row.bf16_tflops:g} TFLOP/s (16-bit), the peaks"
            line += f" that configs/targets.yaml has for {s.row.device}"
            line += f"; measured on {s.device}" if s.device != s.row.device else ""
        lines[s.target, s.device] = line
    return list(lines.values())


def _mean_gain(found: Sequence[Shape]) -> float | None:
    known = [shape.gain for shape in found if shape.gain is not None]
    return statistics.geometric_mean(known) if known else None


# -------------------------------------------------------------------------------------------------------------- plots


def roofline(found: Sequence[Shape], name: Mapping[Any, str]) -> str | None:
    """Each measured shape at its intensity and rate, under the targets' roofs; None where nothing was measured."""
    timed = [shape for shape in found if shape.tflops]
    if not timed:
        return None
    figure, ax = _axes(4.9, 3.9, left=0.6, bottom=0.55, top=0.3)
    xs = [shape.flops / shape.bytes for shape in timed]
    roofs = {s.target: (s.row.bandwidth_gbps, s.row.bf16_tflops) for s in timed if s.row is not None}
    ridges = [tflops * 1e3 / gbps for gbps, tflops in roofs.values()]
    low, high = min([x / 2 for x in (*xs, *ridges)]), max([x * 2 for x in xs] + [x * 3 for x in ridges])
    for target, (gbps, tflops) in roofs.items():
        ridge = tflops * 1e3 / gbps
        corner = [low, ridge, high]
        ax.plot(corner, [min(gbps * x * 1e-3, tflops) for x in corner], color=_COLOUR["ink"], linewidth=1.2)
        which = f"{target}: " if len(roofs) > 1 else ""
        ax.annotate(f"{which}{tflops:g} TFLOP/s", (high, tflops), (0, 4), textcoords="offset points", ha="right")
        middle = math.sqrt(low * ridge)
        at = middle, gbps * middle * 1e-3
        ax.annotate(f"{gbps:g} GB/s", at, (-4, 4), textcoords="offset points", ha="right")
    titles = {}
    for i, (bits, words) in enumerate(_TOKENS):
        some = [s for s in timed if s.tokens <= 1 << bits and (i == 0 or s.tokens > 1 << _TOKENS[i - 1][0])]
        if some:
            drawn = ax.scatter(
                [s.flops / s.bytes for s in some], [s.tflops or 0.0 for s in some], s=34, label=words, zorder=3,
                color=_COLOUR[f"size{i}"], edgecolors=_COLOUR["paper"], linewidths=0.7,
            )  # fmt: skip
            drawn.set_gid(f"points{i}")
            titles[f"points{i}"] = [_point(s, name[s.key]) for s in some]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ys = [shape.tflops or 0.0 for shape in timed]
    ax.set_ylim(min(ys) / 2, 2 * max([*ys, *(tflops for _, tflops in roofs.values())]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if axis is ax.xaxis else (1.0,)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())
    ax.grid(True)
    ax.set_xlabel("arithmetic intensity, FLOP/byte")
    ax.set_ylabel("achieved, TFLOP/s")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=len(_TOKENS), handletextpad=0.1, columnspacing=1.2)
    return _svg(figure, "roofline", "Roofline: achieved rate over arithmetic intensity", titles)


def _point(s: Shape, label: str) -> str:
    gbps = s.bytes / s.time_us * 1e-3 if s.time_us else 0.0
    roof = f", {s.of_roof:.0%} of the roof" if s.of_roof is not None else ""
    return f"{label}\n{s.time_us:.2f} µs, {s.tflops:.2f} TFLOP/s, {gbps:.0f} GB/s{roof}"


def gains(found: Sequence[Shape], name: Mapping[Any, str]) -> str | None:
    """default ÷ best time of each shape, sorted; None where no default was measured."""
    known = sorted(((s.gain, name[s.key], s) for s in found if s.gain is not None), key=lambda row: row[:2])
    if not known:
        return None
    figure, ax = _axes(4.9, 0.7 + _LINE * len(known), left=0.15, bottom=0.55, top=0.15, right=0.55)
    low, high = (pick([1.0, *(gain for gain, _, _ in known)]) for pick in (min, max))
    titles = {}
    for i, (gain, label, s) in enumerate(known):
        ax.plot([1.0, gain], [i, i], color=_COLOUR["faint"], linewidth=1.0, zorder=2)
        (dot,) = ax.plot([gain], [i], "o", color=_COLOUR["point"], markersize=5.5, clip_on=False, zorder=5)
        dot.set_gid(f"gain{i}")
        ax.annotate(f"{gain:.2f}", (max(gain, 1.0), i), (7, -3), textcoords="offset points", fontsize=8)
        ax.annotate(label, (low, i), (4, 5), textcoords="offset points", fontsize=8.5, bbox=_ON_PAPER)
        default_us = s.default[0] if s.default else math.nan
        titles[f"gain{i}"] = [f"{label}\ndefault {default_us:.2f} µs, best {s.time_us:.2f} µs"]
    ax.axvline(1.0, color=_COLOUR["ink"], linewidth=1.0)
    ax.set_xlim(low, max(high, low + 0.1))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_ylim(-0.4, len(known) - 0.3)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.grid(True, axis="x")
    ax.set_xlabel("default time ÷ best time")
    return _svg(figure, "gains", "Default time over best time, by shape", titles)


def enough(shape: Shape) -> bool:
    """Whether a heat map of the shape's trials would show anything."""
    return len({t.config for t in shape.measured}) >= _ENOUGH and len({_cell(t.config) for t in shape.measured}) > 1


def _cell(config: Config) -> tuple[str, tuple[Any, ...], Any]:
    """(variant, block, splits): where a config stands in a heat map."""
    return config.variant, (config.get("block_m", "–"), config.get("block_n", "–")), config.get("num_kv_splits", "–")


def _order(value: Any) -> tuple[Any, ...]:
    """Numbers before text."""
    return (1, str(value)) if isinstance(value, str) else (0, value)


def heat_map(shape: Shape) -> str:
    """The best measured time of each number of splits and block, a group of rows a variant."""
    finest: dict[Config, Trial] = {}
    for trial in sorted(shape.measured, key=lambda t: (t.effort, -(t.median_us or 0.0))):
        finest[trial.config] = trial
    cells: dict[Any, list[Trial]] = {}
    for trial in [*finest.values(), *shape.faults]:
        cells.setdefault(_cell(trial.config), []).append(trial)
    splits = sorted({column for _, _, column in cells}, key=_order)
    lines: list[tuple[str, tuple[Any, ...] | None]] = []  # of each variant its name, then its blocks
    for variant in sorted({variant for variant, _, _ in cells}):
        blocks = {block for v, block, _ in cells if v == variant}
        lines += [(variant, None), *((variant, b) for b in sorted(blocks, key=lambda b: tuple(map(_order, b))))]
    best_us = min(t.median_us for t in finest.values() if t.median_us is not None)

    wide, high, left = 0.55, 0.3, 0.95
    figure, ax = _axes(
        left + max(wide * len(splits), 2.6) + 0.1, 0.55 + high * len(lines), left=left, bottom=0.5, top=0.05
    )  # fmt: skip
    titles = {}
    for y, (variant, block) in enumerate(lines):
        if block is None:
            ax.text(-0.5, y + 0.12, variant, va="center", ha="left", fontweight="bold", fontsize=8.5)
            continue
        for x, column in enumerate(splits):
            if trials := cells.get((variant, block, column)):
                gid = f"cell{y}-{x}"
                _draw_cell(ax, x, y, trials, best_us, gid)
                where = f"{variant}, block {block[0]} × {block[1]}, {column} splits"
                titles[gid] = [f"{where}\n{_told(trials, best_us)}"]
    ax.set_xlim(-0.5, max(len(splits), 2.6 / wide) - 0.5)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_xticks(range(len(splits)), [str(column) for column in splits])
    blocks_at = [(y, f"{block[0]} × {block[1]}") for y, (_, block) in enumerate(lines) if block is not None]
    ax.set_yticks([y for y, _ in blocks_at], [words for _, words in blocks_at])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel("num_kv_splits", loc="left")
    return _svg(figure, "map", "Best time by splits and block", titles)


def _draw_cell(ax: Axes, x: int, y: int, trials: Sequence[Trial], best_us: float, gid: str) -> None:
    """The fastest of the cell's trials on the colour of its band; a cross where none ran."""
    us = min((t.median_us for t in trials if t.median_us is not None), default=None)
    if us is None:
        band, words, colour, fill = "", "×", _COLOUR["ink"], "none"
    else:
        band = str(sum(us > limit * best_us for limit in BANDS))
        words, colour, fill = f"{us:.1f}" if us < 1000 else f"{us:.0f}", _COLOUR[f"text{band}"], _COLOUR[f"heat{band}"]
    first = us == best_us
    edge = _COLOUR["ink" if first else "grid" if us is None else "paper"]
    at = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=fill, edgecolor=edge, linewidth=1.8 if first else 0.6)
    at.set(gid=gid, zorder=3 if first else 2, clip_on=False)
    ax.add_patch(at)
    ax.text(x, y + 0.03, words, ha="center", va="center", color=colour, fontsize=8, zorder=4)


def _told(trials: Sequence[Trial], best_us: float) -> str:
    """What the hover of a cell says."""
    good = sorted((t for t in trials if t.median_us is not None), key=lambda t: (t.median_us, t.config.to_json()))
    bad = collections.Counter(t.status for t in trials if t.status != OK)
    lines = []
    if good:
        us = good[0].median_us or math.nan
        lines.append(f"{us:.2f} µs, {us / best_us:.3f} × the best of the map, of {len(good)} configs; {good[0].config}")
    if bad:
        lines.append("failed: " + ", ".join(f"{count} {status}" for status, count in sorted(bad.items())))
    return "\n".join(lines)


def _axes(
    width: float, height: float, *, left: float, bottom: float, top: float, right: float = 0.1
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; all in inches."""
    figure = Figure(figsize=(width, height))
    box = left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height
    return figure, figure.add_axes(box)


def _svg(figure: Figure, salt: str, title: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The figure as an `<svg>` for the inside of a page. `titles`: by an artist's gid the text of each of its marks."""
    file = io.BytesIO()
    # The salt gives ids that are the same each time, and others in each figure. Glyphs are the browser's.
    with style.context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    root = ET.fromstring(_NOT_XML.sub("", file.getvalue().decode()))
    for parent in list(root.iter()):
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): _plain(value) for name, value in element.attrib.items()}
    for element in list(root.iter()):
        gid = element.get("id", "")
        if gid in titles:
            for mark, words in zip(list(element.iter("use")) or [element], titles[gid], strict=True):
                ET.SubElement(mark, "title").text = words
        if gid and gid not in used:
            del element.attrib["id"]
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": title, "style": f"--width: {figure.get_figwidth() * 96:.0f}px"}
    return ET.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A tag's or an attribute's name without its namespace, as HTML wants it."""
    return name.rpartition("}")[2]


def _plain(value: str) -> str:
    """An attribute's value with the page's colours and font."""
    value = re.sub(r"#0000[0-9a-f]{2}\b", lambda found: _NAMES.get(found[0], found[0]), value)
    return re.sub(r"font-family: [^;]*(; |$)", "", value)


# --------------------------------------------------------------------------------------------------------------- page


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    filters: dict[str, Callable[..., str]] = {
        "us": lambda value: "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}",
        "times": lambda value: "" if value is None else f"{value:.3f}",
        "percent": lambda value: "" if value is None else f"{value * 100:.1f} %",
        "count": lambda value: "" if value is None else f"{value}",
        "fields": lambda problem: ", ".join(_words(k, v) for k, v in problem.fields().items()),
    }
    made.filters.update(filters)
    return made
