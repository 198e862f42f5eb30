"""The verbs of `mla-tune` that tune: plan, run. Each is a library function's; here are options, progress and Ctrl-C.

Exit codes: 0 done, 1 something fell short, 2 wrong usage, 130 a second Ctrl-C.
"""

from __future__ import annotations

import contextlib
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_jit.cli_options import DONE, SHORT, positive, print_json, repeated, verb
from mla_jit.cli_progress import Interrupts, Watch, counting, drawn
from mla_jit.errors import InvalidInput, MlaJitError

if TYPE_CHECKING:
    from mla_jit.models import Model
    from mla_jit.problem import Tunable
    from mla_jit.target import Target
    from mla_jit.tuning import schedule, sweep
    from mla_jit.tuning.rows import Trial

HURRIED = 130  # as a shell has it for a process that Ctrl-C ended

_AXES = (
    repeated(
        "--tp", positive, "Share the heads among so many tensor-parallel ranks.", default=("1",), show_default=True
    ),
    repeated(
        "--dtype", str, "Take these dtypes: bf16, fp16, fp8 (a cache of fp8, q bf16), fp8xfp8, or QxCACHE.",
        show_default="the model's",
    ),
    repeated("--batch", positive, "Take so many sequences a call.", show_default="1,4,16,64,128; prompts 1,4,16"),
    repeated(
        "--kv-len", positive, "Take so many tokens a sequence; what exceeds a model's context is left out.",
        show_default="1024,4096,16384,65536; prompts 1024,4096,16384",
    ),
    repeated(
        "--q-len", positive, "Take so many query tokens a sequence; fewer than --kv-len are a prompt's chunk behind a "
        "prefix.", show_default="1; prompts as many as --kv-len",
    ),
    repeated(
        "--lengths", str, "Let the lengths of a batch be even, all as long as the bound, or log-uniform (also called "
        "ragged) or uniform up to it, or one-long, the others short.", default=("even",), show_default=True,
    ),
    click.option(
        "--layout", default="joint", show_default=True,
        help="Take a cache that is joint (one tensor), split (ckv, kpe), or three (fp8 ckv, kv_scales, kpe).",
    ),
    click.option(
        "--page-size", type=click.IntRange(1), default=64, show_default=True, help="Take pages of so many tokens."
    ),
)  # fmt: skip
_OP = (
    click.option(
        "--op", type=click.Choice(["decode", "prefill"]), default="decode", show_default=True,
        help="Take calls of this op; prefill: prompts, un-absorbed.",
    ),
    click.option(
        "--full", is_flag=True, show_default="causal",
        help="Let every query of a prompt see all keys, as those of a chunk see its prefix.",
    ),
)  # fmt: skip
_OF_ALL = ("model", "tp", "dtype", "batch", "kv_len", "q_len")
# By op: the options that say something of it beside these, and what stands for the absent ones.
_OWN = {"decode": ("lengths", "page_size", "layout"), "prefill": ("full",)}
_ABSENT: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {"batch": (1, 4, 16, 64, 128), "kv_len": (1024, 4096, 16384, 65536), "q_len": (1,)},
    "prefill": {"batch": (1, 4, 16), "kv_len": (1024, 4096, 16384), "q_len": ()},
}


def _shapes(command: Callable[..., Any], required: bool = True, more: Sequence[Any] = ()) -> Callable[..., Any]:
    """Adds the options that say which shapes."""
    text = "Take the shapes of these models, rows of configs/models.yaml."
    for option in reversed((*more, repeated("--model", str, text, required=required), *_AXES)):
        command = option(command)
    return command


def _shapes_of_an_op(command: Callable[..., Any]) -> Callable[..., Any]:
    return _shapes(command, more=_OP)


def _shapes_or_plan(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Take the shapes of a file that `mla-tune plan --out` has written, instead of models."
    plan = click.option("--plan", "file", type=click.Path(path_type=Path), help=text)
    return plan(_shapes(command, required=False, more=_OP))


def _given(names: Iterable[str]) -> list[str]:
    """The flags of those of these options that stand on the command line."""
    source = click.get_current_context().get_parameter_source
    given = [name for name in names if source(name) == click.core.ParameterSource.COMMANDLINE]
    return ["--" + name.replace("_", "-") for name in given]


def _of_op(options: dict[str, Any]) -> dict[str, Any]:
    """The options that say something of the op, with what stands for absent ones. InvalidInput for one of another."""
    op = options.get("op", "decode")
    if foreign := _given(name for other, names in _OWN.items() if other != op for name in names):
        raise InvalidInput(f"{', '.join(foreign)}: says nothing of {op}; leave it out")
    found = {name: options[name] for name in ("op", *_OF_ALL, *_OWN[op]) if name in options}
    return found | {name: found[name] or absent for name, absent in _ABSENT[op].items()}


def _models(options: dict[str, Any]) -> list[tuple[Model, int]]:
    from mla_jit import models

    return [(models.by_name(name), tp) for name in options["model"] for tp in options["tp"]]


def _axes(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the op's function of `sweep.SHAPES`."""
    found = {
        "dtypes": options["dtype"] or None, "batches": options["batch"], "kv_lens": options["kv_len"],
        "q_lens": options["q_len"],
    }  # fmt: skip
    found |= {name: options[name] for name in ("page_size", "lengths", "layout") if name in options}
    return found | ({"causal": not options["full"]} if "full" in options else {})


def _problems(target: Target, options: dict[str, Any], memory_bytes: int | None) -> list[Any]:
    from mla_jit.tuning import sweep

    options = _of_op(options)
    made = sweep.SHAPES[options.get("op", "decode")]
    return list(made(_models(options), target, memory_bytes=memory_bytes, **_axes(options)))


def _search(default: str | None, shown: str) -> Callable[..., Any]:
    text = "Measure the configs that promise most (auto), or all of them (exhaustive)."
    choice = click.Choice(["auto", "exhaustive"])
    return click.option("--search", "how", type=choice, default=default, show_default=shown or True, help=text)


def _jobs(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Compile so many kernels at a time."
    return click.option("--jobs", type=click.IntRange(1), show_default="one a usable CPU", help=text)(command)


# ----------------------------------------------------------------------------------------------------------------- plan


@click.command("plan")
@click.option("--target", show_default="this machine's", help="Plan for this row of configs/targets.yaml.")
@_shapes_of_an_op
@_search("auto", "")
@_jobs
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the plan to this file, for `mla-tune run --plan`.",
)
@verb
def plan(target: str | None, how: str, jobs: int | None, out: Path | None, as_json: bool, **options: Any) -> int:
    """Show what `run` would tune, without doing it: the shapes, each once, who shares them, and how long they take.

    Models with the same local heads and dims share their shapes. Needs no GPU: plan anywhere, write the plan with
    --out, and tune by it on a machine that has the device.

    \b
    mla-tune plan --model deepseek-v3,kimi-k2 --tp 8 --target TARGET --out FILE
    mla-tune plan --op prefill --model deepseek-v3 --tp 8 --q-len 2048 --kv-len 2048,8192,32768
    mla-tune run --plan FILE
    """
    from mla_jit import target as targets
    from mla_jit.tuning import schedule

    there = targets.by_name(target) if target is not None else targets.here()
    memory_bytes = _memory_bytes(there) if target is None else None
    options = _of_op(options)
    with counting() as on_count:
        found = schedule.make(
            _models(options), there, options={**options, "search": how}, memory_bytes=memory_bytes, jobs=jobs,
            on_count=on_count, op=options["op"], **_axes(options),
        )  # fmt: skip
    if out is not None:
        schedule.write(found, out)
    ok = bool(found.shapes) and not any(left.unserved for left in found.left_out)
    if as_json:
        print_json({"ok": ok, **found.to_json()})
    else:
        _show_schedule(found, how)
        if out is not None:
            click.echo(f"written to {out}; go on where the device is: mla-tune run --plan {shlex.quote(str(out))}")
    return DONE if ok else SHORT


def _show_schedule(found: schedule.Schedule, how: str) -> None:
    from mla_jit.tuning import schedule

    click.echo(f"{_number(len(found.shapes), 'shape')} for {found.target} ({found.device})")
    for (like, makers), shapes in schedule.families(found.shapes).items():
        click.echo(f"\n{like.kind}: {', '.join(makers)}")
        click.echo("   batch  kv_len  q_len  lengths      configs  kernels  auto measures     auto  exhaustive")
        for shape in shapes:
            p = shape.problem
            times = f"{_span(shape.auto_s):>7}  {_span(shape.exhaustive_s):>10}"
            click.echo(
                f"  {p.batch:6}  {p.max_kv_len:6}  {p.q_len:5}  {p.spread:11}  {shape.candidates:7}  "
                f"{shape.kernels:7}  {shape.measured:13}  {times}"
            )
    _show_left_out(found.left_out)
    if found.shapes:
        totals = {name: found.seconds(name) for name in ("auto", "exhaustive")}
        if None in totals.values():
            click.echo("\nno estimate of the time: its constants are a GPU's")
            return
        click.echo(
            f"\nin all about {_span(totals.pop(how))} by {how}, "
            + "".join(f"{_span(s)} by {n}" for n, s in totals.items())
        )
        click.echo(
            f"estimated for one GPU and {_number(found.jobs, 'kernel')} compiled at a time, from "
            f"{schedule.MEASURED_ON}: {schedule.MEASURED_S:g} s a measured config, "
            f"{schedule.PLAYOFF_S:g} s a shape for its playoff, {schedule.COMPILED_S:g} s of a CPU a kernel"
        )


def _show_left_out(left_out: Sequence[schedule.LeftOut], err: bool = False) -> None:
    for left in left_out:
        click.echo(f"left out: {left.problem.label}: {left.reason}", err=err)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _span(seconds: float | None) -> str:
    """ "45 s", "6 min", "1 h 20 min"."""
    if seconds is None:
        return "-"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


# ------------------------------------------------------------------------------------------------------------------ run


def _seconds(context: Any, parameter: Any, text: str) -> float:
    """ "90s", "30m", "1h30m", or seconds."""
    number = r"\d+(?:\.\d+)?|\.\d+"
    found = re.fullmatch(rf"(?:({number})h)?(?:({number})m)?(?:({number})s?)?", text.strip())
    if found is None or not any(found.groups()):
        raise click.BadParameter(f"{text!r} is no time; write 90s, 30m or 1h30m")
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


def _index(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError(f"{number} is no index of a GPU; the first is 0")
    return number


@click.command("run")
@_shapes_or_plan
@_search(None, "auto, or the plan's")
@click.option(
    "--budget", "budget_s", callback=_seconds, default="10m", show_default=True,
    metavar="TIME", help="End the sweep after this time: 90s, 30m or 1h30m.",
)  # fmt: skip
@_jobs
@repeated("--gpus", _index, "Share the shapes among the GPUs of these indices.", default=("0",), show_default=True)
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Repeat nothing that the database has, or all."
)
@click.option(
    "--timeout", type=click.FloatRange(1), default=60.0, show_default=True,
    help="Kill a candidate after so many seconds.",
)  # fmt: skip
@click.option(
    "--db", type=click.Path(path_type=Path), show_default="the user's: MLA_JIT_TUNING_DB",
    help="Store the trials in this database; it is made if absent.",
)  # fmt: skip
@click.option("--quiet", is_flag=True, help="Show no progress on stderr.")
@verb
def run(file: Path | None, how: str | None, budget_s: float, jobs: int | None, gpus: tuple[int, ...], resume: bool,
        timeout: float, db: Path | None, quiet: bool, as_json: bool, **options: Any) -> int:  # fmt: skip
    """Tune shapes on this machine's GPU (or its CPU), and store every trial. Later calls use the best by themselves.

    The shapes are those of the models, or of a plan. Every candidate is checked against the reference before its time
    counts. Ctrl-C keeps what was measured, and the same command goes on from there; a second one does not wait for the
    running measurements.

    \b
    mla-tune run --model deepseek-v3 --tp 8 --batch 1,16,64 --kv-len 1024,4096 --budget 10m
    mla-tune run --op prefill --model deepseek-v3 --tp 8 --batch 1,4 --kv-len 1024,8192 --budget 10m
    mla-tune run --plan FILE --gpus 0,1 --budget 1h30m
    """
    from mla_jit import target as targets
    from mla_jit.tuning import schedule, store

    _check_source(file, options)
    if not gpus:
        raise InvalidInput("--gpus is empty; name at least one, the first is 0")
    there = targets.here()
    wanted: list[Tunable]
    if file is not None:
        planned = schedule.read(file)
        planned.check(there, file)
        wanted, how = planned.problems, how or planned.options.get("search")
    else:
        wanted = _problems(there, options, None)
    problems, left_out = schedule.fitting(wanted, there, _memory_bytes(there))
    if not as_json:
        _show_left_out(left_out, err=True)
    if not problems:
        raise MlaJitError(f"there is no shape to tune: {_number(len(left_out), 'shape')} left out")
    path = db if db is not None else store.user_path()
    on_gpu = there.runtime not in ("cpu", "host")
    devices = [f"cuda:{index}" for index in gpus] if on_gpu else ["cpu"]
    swept = _sweep(
        problems, there, devices, path, budget_s, jobs, quiet, as_json, how=how or "auto", resume=resume,
        timeout_s=timeout,
    )  # fmt: skip
    short = not swept.complete or any(left.unserved for left in left_out)
    if as_json:
        left = [{"problem": left.problem.fields(), "reason": left.reason} for left in left_out]
        print_json({
            "ok": not short, "target": there.name, "device": there.device, "search": how or "auto", "database": path,
            "interrupted": swept.interrupts > 0, "seconds": swept.seconds, "not_reached": swept.not_reached,
            "left_out": left, "shapes": [_finished_json(row, swept.known) for row in swept.rows],
        })  # fmt: skip
    else:
        _show_swept(swept, path)
    return HURRIED if swept.interrupts > 1 else SHORT if short else DONE


def _check_source(file: Path | None, options: dict[str, Any]) -> None:
    """InvalidInput unless the shapes come from a plan or from models, and from one of these."""
    if (file is None) == (not options["model"]):
        raise InvalidInput("say which shapes, by one of --plan FILE and --model NAME")
    given = _given(("op", *_OF_ALL, *(name for names in _OWN.values() for name in names)))
    if file is not None and given:
        raise InvalidInput(f"--plan has the shapes already; leave out {', '.join(given)}, or make another plan")


def _memory_bytes(there: Target) -> int | None:
    """A third of the device's memory: a shape's cache must leave room for the inputs' rotation. None: not known."""
    from mla_jit import target as targets

    if there.runtime in ("cpu", "host"):
        return 1 << 31
    total = targets.memory_bytes()
    return None if total is None else total // 3


@dataclass
class _Swept:
    """How far a sweep came. `interrupts`: times that Ctrl-C was pressed. `known`: best rows of shapes done before."""

    shapes: int
    rows: list[sweep.Finished] = field(default_factory=list)
    known: dict[Tunable, Trial] = field(default_factory=dict)
    interrupts: int = 0
    seconds: float = 0.0

    @property
    def not_reached(self) -> int:
        return self.shapes - len(self.rows)

    @property
    def tuned(self) -> list[sweep.Finished]:
        return [row for row in self.rows if row.outcome and row.outcome.stopped == "done" and row.outcome.median_us]

    @property
    def early(self) -> list[sweep.Finished]:
        return [row for row in self.rows if row.outcome is not None and row.outcome.stopped != "done"]

    @property
    def complete(self) -> bool:
        before = sum(row.outcome is None for row in self.rows)
        return not self.interrupts and len(self.tuned) + before == self.shapes


def _sweep(
    problems: Sequence[Tunable], there: Target, devices: Sequence[str], path: Path, budget_s: float,
    jobs: int | None, quiet: bool, as_json: bool, **options: Any,
) -> _Swept:  # fmt: skip
    from mla_jit.tuning import builds, pool, store, sweep

    found, started = _Swept(len(problems)), time.monotonic()
    watch = Watch(len(problems), devices, there, budget_s)
    with (
        store.Store(path) as database,
        pool.Pool(devices, quarantine=path.with_suffix(".quarantine")) as workers,
        builds.Builds(there, jobs) as compiling,
        drawn(watch, quiet, as_json) as say,
    ):
        interrupts = Interrupts(say, compiling.close, workers.close)

        def on_event(name: str, data: dict[str, Any]) -> None:
            if name == "start":
                _check_kind(data["device"], there)
            watch.on_event(name, data)

        running = sweep.run(
            problems, there, devices, workers, database, budget_s=budget_s, builds=compiling, on_event=on_event,
            stop=interrupts.stop, command=_command(), **options,
        )  # fmt: skip
        try:
            with interrupts, contextlib.closing(running):  # type: ignore[type-var]
                for done in running:
                    found.rows.append(done)
                    watch.finished(done)
                    say(_finished(done))
        except (KeyboardInterrupt, MlaJitError):
            if not interrupts.count:
                raise
        if any(row.outcome is None for row in found.rows):
            place = {"target": there.name, "device": there.device}
            found.known = {trial.problem: trial for trial in database.best(**place)}
    found.interrupts, found.seconds = interrupts.count, time.monotonic() - started
    return found


def _check_kind(device: str, there: Target) -> None:
    """InvalidInput for another GPU than the first one, for which the sweep's rows will be."""
    from mla_jit import target as targets

    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index) > 0:
        other = targets.of_device(kind, int(index))
        if (other.name, other.device) != (there.name, there.device):
            raise InvalidInput(
                f"GPU {index} is {other.device}, the first one {there.device}: rows are for one kind; tune each by "
                "itself, with CUDA_VISIBLE_DEVICES"
            )


def _command(*without: str) -> str:
    return shlex.join(["mla-tune", *(word for word in sys.argv[1:] if word not in without)])


# -------------------------------------------------------------------------------------------------------------- results


def _finished(done: sweep.Finished) -> str:
    total = "" if done.problem.spread == "even" else f", {done.problem.total_kv} tokens in all"
    what = f"{done.problem}{total}"
    if done.outcome is None:
        return f"{what}: finished before"
    found = done.outcome
    if found.median_us is None:
        first = f"; {found.faults[0][1]}: {found.faults[0][2]}" if found.faults else ""
        return f"{what}: nothing measured ({found.stopped}); {found.why}{first}"
    gain = f", default {found.default_us:.1f}" if found.default_us is not None else ""
    early = "" if found.stopped == "done" else f" ({found.stopped}: best so far)"
    return (
        f"{what}: {found.median_us:.1f} us{gain}{early}; {found.explored} configs in {done.seconds:.1f} s, "
        f"{len(found.faults)} faulty; {found.winner}"
    )


def _finished_json(done: sweep.Finished, known: dict[Tunable, Trial]) -> dict[str, Any]:
    row: dict[str, Any] = {"problem": done.problem.fields(), "device": done.device, "seconds": done.seconds}
    if (found := done.outcome) is None:
        best = known.get(done.problem)
        return {
            **row, "finished_before": True, "winner": best and dict(best.config), "variant": best and best.variant,
            "median_us": best and best.median_us, "spread_us": best and best.spread_us,
            "default_us": best and best.default_us, "why": "the best of the database", "faults": [],
        }  # fmt: skip
    second = found.runner_up
    return {
        **row, "finished_before": False, "winner": dict(found.winner), "variant": found.winner.variant,
        "median_us": found.median_us, "spread_us": found.spread_us, "default_us": found.default_us,
        "runner_up": second and {"variant": second[0].variant, "config": dict(second[0]), "median_us": second[1]},
        "explored": found.explored, "skipped": found.skipped, "stopped": found.stopped, "why": found.why,
        "faults": [{"config": str(config), "status": status, "note": note} for config, status, note in found.faults],
    }  # fmt: skip


def _show_swept(swept: _Swept, path: Path) -> None:
    before = sum(row.outcome is None for row in swept.rows)
    nothing = len(swept.rows) - len(swept.tuned) - len(swept.early) - before
    parts = [f"{_number(len(swept.tuned), 'shape')} tuned in {_span(swept.seconds)}", f"{before} finished before"]
    counts = ((len(swept.early), "stopped early"), (nothing, "without a config that runs"))
    parts += [f"{count} {what}" for count, what in (*counts, (swept.not_reached, "not reached")) if count]
    click.echo(", ".join(parts))
    outcomes = [row.outcome for row in swept.tuned if row.outcome is not None]
    gains = [math.log(o.default_us / o.median_us) for o in outcomes if o.default_us and o.median_us]
    if gains:
        click.echo(f"{math.exp(statistics.fmean(gains)):.3f} times as fast as the defaults (geometric mean)")
    click.echo(f"database {path}")
    if swept.interrupts or swept.early or swept.not_reached:
        cause = "interrupted" if swept.interrupts else "the budget is spent"
        click.echo(f"{cause}; what was measured is kept. To go on: {_command('--no-resume')}")


VERBS = (plan, run)
