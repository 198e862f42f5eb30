"""Runs our programs that need Triton as an interpreter in forks of one process, which has torch and Triton loaded.

Loading takes longer than most of them. Lines of JSON come in, {"program", "arguments", "stdout", "stderr"}, the last
two files to write; for each one line goes out, the exit status, negative for a signal. Ends when its input does. Use
`helpers.interpreted`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any


def run(request: dict[str, Any]) -> None:
    """Runs a program of ours in this process, a fork, and ends it as the program's own interpreter would: an error is
    told on stderr, with exit status 1."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [f"{request['program']}.py", *request["arguments"]]
    sys.exit(importlib.import_module(request["program"]).main())


def read_templates() -> None:
    """Compiles the assembly templates' texts, which each fork would do anew, by rendering what uses most of them."""
    from mla_jit import ops, target
    from mla_jit.compile import render
    from mla_jit.problem import DecodeProblem

    hopper = target.by_name("sm_90")
    for variant in ops.every("decode"):
        for page_size in (1, 64):
            problem = DecodeProblem(num_heads=16 if "narrow" in variant.name else 128, batch=3, page_size=page_size)
            config = variant.default(problem, hopper)
            if variant.backend == "asm" and variant.rejects(problem, hopper, config) is None:
                for source in variant.sources(problem, hopper, config):
                    if source.toolchain == "ptx":
                        render.render(source)


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ("assembled_main", "interpreted_prefill", "interpreted_merge"):  # with what they need, before the forks
        importlib.import_module(name)
    read_templates()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
