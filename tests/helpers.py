"""What several test files share: verbs of mla-tune as a user calls them, and the processes that are ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from mla_jit.cli import main


def invoke(*arguments: object, code: int = 0) -> str:
    """What `mla-tune` prints, to both streams; it must end with this exit code."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


def invoke_json(*arguments: object, code: int = 0) -> Any:
    """The document that it prints with --json."""
    done = CliRunner().invoke(main, [*(str(a) for a in arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def children() -> set[int]:
    """Processes whose parent we are, zombies too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(state[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found
