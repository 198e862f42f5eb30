"""How the verbs that tune show what they do, and end: a live table of a sweep, bars, and Ctrl-C in two stages."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mla_jit.config import Config
    from mla_jit.problem import Tunable
    from mla_jit.target import Target
    from mla_jit.tuning import sweep
    from mla_jit.tuning.rows import Measurement


class Interrupts:
    """Ctrl-C during a sweep. The first ends it after the running measurements; the second at once, by ending what it
    waits for; a third wherever it is.

    A context manager. `soften` and `hurry` make that come soon; they are called in threads of their own.
    """

    def __init__(self, say: Callable[[str], None], soften: Callable[[], None], hurry: Callable[[], None]):
        self.stop, self.count = threading.Event(), 0
        self._say, self._soften, self._hurry = say, soften, hurry
        self._before: Any = None

    def __enter__(self) -> Interrupts:  # noqa: PYI034  # Self is of a later Python than 3.10
        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        self.count += 1
        self.stop.set()
        # Not here: the interrupted code may hold what these need.
        threading.Thread(target=self._end, args=(self.count > 1,), daemon=True).start()
        if self.count > 2:  # raised wherever the program is, and lost, with a traceback, if that is a destructor
            raise KeyboardInterrupt

    def _end(self, at_once: bool) -> None:
        if at_once:
            self._hurry()
        else:
            self._say("stopping after the running measurements, which are kept; Ctrl-C again does not wait for them")
            self._soften()


@dataclass
class Work:
    """The shape in work on a device. `planned` is None while the best of other lengths are timed at it."""

    problem: Tunable
    planned: int | None
    default: Config | None
    started: float
    measured: int = 0
    faults: int = 0
    over: bool = False
    times_us: dict[Config, float] = field(default_factory=dict)  # the longest measurement of each

    def add(self, config: Config, found: Measurement) -> None:
        self.measured += 1
        if found.median_us is not None:
            self.times_us[config] = found.median_us
        else:
            self.faults += 1

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        return 1.0 if self.over or not self.planned else min(1.0, self.measured / self.planned)

    @property
    def progress(self) -> str:
        return str(self.measured) if self.planned is None else f"{self.measured}/{self.planned}"

    def __str__(self) -> str:
        parts = []
        if self.times_us:
            parts.append(f"best {min(self.times_us.values()):.1f} us")
        if self.default is not None and (default_us := self.times_us.get(self.default)) is not None:
            parts.append(f"default {default_us:.1f}")
        parts += [f"{self.faults} faulty"] if self.faults else []
        what = "" if self.planned is not None else ", the best of other lengths"
        return f"{self.problem.label}{what}  {', '.join(parts)}".rstrip()


class Watch:
    """What a sweep is doing, from its events; drawn by rich as a bar over the shapes and one a device. Thread-safe."""

    def __init__(self, shapes: int, devices: Sequence[str], target: Target, budget_s: float,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self.shapes, self.target, self.clock = shapes, target, clock
        self.started = clock()
        self.deadline = self.started + budget_s
        self.works: dict[str, Work | None] = dict.fromkeys(devices)
        self.done = 0
        self.took_s: list[float] = []  # shapes that were not finished before
        self._lock = threading.Lock()

    def on_event(self, name: str, data: dict[str, Any]) -> None:
        from mla_jit.tuning import search

        device, problem = data["device"], data["problem"]
        with self._lock:
            work = self.works.get(device)
            if name == "start":
                self.works[device] = Work(problem, data["planned"], self._default(problem), self.clock())
            elif name == "trial" and (work is None or work.problem != problem or work.over):
                if work is None or work.planned is not None or work.problem != problem:
                    work = self.works[device] = Work(problem, None, self._default(problem), self.clock())
                work.add(data["config"], data["measurement"])
            elif work is not None and (name == "pass" or (name == "trial" and data["effort"] != search.PLAYOFF)):
                work.add(data["config"], data["measurement"])
            elif work is not None and name == "done":
                work.over = True

    def _default(self, problem: Tunable) -> Config:
        from mla_jit import plan

        return plan.analytic(problem, self.target).config

    def finished(self, done: sweep.Finished) -> None:
        with self._lock:
            self.done += 1
            if done.outcome is not None:
                self.took_s.append(done.seconds)

    def left_s(self) -> float | None:
        """How long it may still take: as long a shape as those before, and no longer than the budget. None: no idea."""
        with self._lock:
            now = self.clock()
            open_ = [work for work in self.works.values() if work is not None and not work.over]
            shares = sum(work.share for work in open_)
            if self.took_s:
                a_shape_s = statistics.fmean(self.took_s)
            elif shares > 0.05:
                a_shape_s = sum(now - work.started for work in open_) / shares
            else:
                return None
            left_s = a_shape_s * max(0.0, self.shapes - self.done - shares) / len(self.works)
            return max(0.0, min(left_s, self.deadline - now))

    def __rich__(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        left_s = self.left_s()
        left = "" if not left_s else f", about {clock_text(left_s)} left"
        table = Table.grid(padding=(0, 2))
        for justify in ("left", "left", "right", "left"):
            table.add_column(justify=justify, no_wrap=True)
        with self._lock:
            bar = ProgressBar(total=self.shapes, completed=self.done, width=20)
            elapsed = clock_text(self.clock() - self.started)
            table.add_row("shapes", bar, f"{self.done}/{self.shapes}", f"{elapsed}{left}")
            for device, work in self.works.items():
                if work is not None:
                    bar = ProgressBar(total=1.0, completed=work.share, width=20)
                    table.add_row(device, bar, work.progress, str(work))
        return table


def clock_text(seconds: float) -> str:
    """ "0:04:10"."""
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


@contextlib.contextmanager
def drawn(watch: Watch, quiet: bool, as_json: bool) -> Iterator[Callable[[str], None]]:
    """Draws it on stderr while in the block, if that is a terminal. Gives how to print a line there."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        if console.is_terminal and not quiet:
            stack.enter_context(Live(watch, console=console, transient=True, refresh_per_second=10))
        yield lambda text: None if quiet or (as_json and not console.is_terminal) else _print(console, text)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def counting() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr over shapes that are counted, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("counting configs", total=None)
        yield lambda counted, of: progress.update(task, completed=counted, total=of)


@contextlib.contextmanager
def advancing(total: int, quiet: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def advance(text: str) -> None:
            progress.update(task, advance=1)
            if not quiet:
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield advance
