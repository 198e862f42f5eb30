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
import traceback
import warnings
from typing import Any


def run(request: dict[str, Any]) -> int:
    """The exit status of a program of ours in this process, whose output goes to files from now on."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.argv = [f"{request['program']}.py", *request["arguments"]]
    try:
        return int(importlib.import_module(request["program"]).main() or 0)
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    warnings.simplefilter("ignore")
    for name in ("assembled_main", "interpreted_prefill", "interpreted_merge"):  # with what they need, before the forks
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
