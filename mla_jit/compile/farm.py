"""`Farm`: compiles sources into the cache side by side, each once, in child processes that are used again."""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future

from mla_jit.compile import cache
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.compile.child import Compiler
from mla_jit.errors import MlaJitError

_PATIENCE_S = 5.0  # that `close` has for children that were just being started
Result = tuple[Artifact, cache.Origin] | MlaJitError


class Farm:
    """Compiles `jobs` sources at a time, one a usable CPU if absent. A context manager; safe in threads.

    What is asked for comes before what is only expected (`idle`: 1, or more for what is expected later); that takes no
    more than seven eighths of them.
    """

    def __init__(self, jobs: int | None = None):
        self._jobs = jobs or len(os.sched_getaffinity(0))
        self._futures: dict[Source, Future[Result]] = {}
        self._queue: list[tuple[int, int, Source]] = []
        self._numbers = itertools.count()
        self._compilers: list[Compiler] = []
        self._threads = 0
        self._busy = self._idle = 0  # children at work; of those, with what is only expected
        self._closed = False
        self._changed = threading.Condition()
        self._finalizer = weakref.finalize(self, _end, self._compilers)  # at exit, too

    def submit(self, source: Source, *, idle: int = 0) -> Future[Result]:
        """The artifact and where it came from, or the error, once it is there. Cancelled where the farm is closed."""
        with self._changed:
            future = self._futures.get(source)
            if future is None:
                future = self._futures[source] = Future()
                if self._closed:
                    future.cancel()
            if not future.done() and not future.running():
                heapq.heappush(self._queue, (idle, next(self._numbers), source))
                if self._threads < self._jobs and len(self._queue) > self._threads - self._busy:
                    self._threads += 1
                    threading.Thread(target=self._serve, name="mla_jit-compile", daemon=True).start()
                self._changed.notify()
            return future

    def get(self, source: Source) -> Future[Result] | None:
        """What `submit` gave for the source; None where it was not asked for."""
        return self._futures.get(source)

    def _serve(self) -> None:
        compiler = Compiler()
        self._compilers.append(compiler)
        with compiler:
            while (work := self._next()) is not None:
                idle, source, future = work
                try:
                    future.set_result(cache.build_traced(source, compiler=compiler))
                except MlaJitError as error:
                    future.set_result(error)
                except BaseException as error:  # for whom waits
                    future.set_exception(error)
                with self._changed:
                    self._busy -= 1
                    self._idle -= idle > 0
                    self._changed.notify_all()

    def _next(self) -> tuple[int, Source, Future[Result]] | None:
        """The next to compile, waiting for one; None once the farm is closed."""
        with self._changed:
            while not self._closed:
                while self._queue and not (self._queue[0][0] and self._idle >= max(1, self._jobs * 7 // 8)):
                    idle, _, source = heapq.heappop(self._queue)
                    future = self._futures[source]
                    if not future.running() and not future.done() and future.set_running_or_notify_cancel():
                        self._busy += 1
                        self._idle += idle > 0
                        return idle, source, future
                self._changed.wait()
        return None

    def close(self) -> None:
        """Ends all children; what they have not compiled is cancelled or ends in CompilerAborted."""
        with self._changed:
            self._closed = True
            for future in self._futures.values():
                future.cancel()
            self._changed.notify_all()
        self._finalizer()
        deadline = time.monotonic() + _PATIENCE_S
        with self._changed:
            while self._busy and time.monotonic() < deadline:  # with a child that was just being started
                self._changed.wait(0.02)
                _end(self._compilers)

    def __enter__(self) -> Farm:  # noqa: PYI034  # Self is of a later Python than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(compilers: Sequence[Compiler]) -> None:
    for compiler in compilers:
        compiler.kill()
