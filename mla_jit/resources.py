"""Where the data files are: `asm_templates`, `configs` and `tuning_db`, in a wheel or in a checkout; `write_whole`.

In a wheel they are installed inside the package (`mla_jit/_data/<name>`); in a checkout or an editable install they
stand beside it. Nothing else in the package builds such a path.
"""

from __future__ import annotations

import functools
import os
import uuid
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
NAMES = ("asm_templates", "configs", "tuning_db")


def path(*parts: str) -> Path:
    """The path of a data file or folder, e.g. `path("configs", "targets.yaml")`. Raises FileNotFoundError."""
    for root in (PACKAGE / "_data", PACKAGE.parent):
        found = root.joinpath(*parts)
        if found.exists():
            return found
    raise FileNotFoundError(
        f"mla_jit's data file {'/'.join(parts)} is missing; reinstall the package (it ships {', '.join(NAMES)})"
    )


@functools.cache
def load_yaml(*parts: str) -> Any:
    """The parsed content of a YAML data file, read once a process."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path(*parts).read_text(encoding="utf-8"), Loader=loader)


def write_whole(file: Path, text: str) -> None:
    """Makes `file` this text at once or, with an OSError, not at all; what stood there is replaced."""
    staged = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with staged.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(file)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
