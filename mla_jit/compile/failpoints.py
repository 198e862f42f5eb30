"""Named points at which a test can make the cache die, stall or run out of space; they cost one comparison otherwise.

The setting `failpoint` ("name=action") arms one of FAILPOINTS. Actions: `kill` (SIGKILL to this process), `abort`
(SIGABRT), `enospc` (OSError, no space left), `sleep:SECONDS`. Each point stands where the code must survive it anyway.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from mla_jit import settings
from mla_jit.errors import SettingsError

FAILPOINTS = (
    "before_lock",  # nothing done yet
    "locked",  # the key's lock is held, nothing compiled
    "compiled",  # the artifact is in memory only
    "staged_binary",  # staging holds the binary
    "staged_manifest",  # staging holds the whole entry, the directory is not yet synchronised
    "before_rename",  # staging is on the disk
    "after_rename",  # the entry is visible, its parent directory is not yet synchronised
    "before_unlock",  # published, the lock is still held
    "evict",  # an entry is about to be moved aside
    "evicted",  # it lies in staging and is about to be deleted
)


def failpoint(name: str) -> None:
    """Does what the setting says for `name`, which may be an OSError. SettingsError for one that makes no sense."""
    armed = settings.current().failpoint
    if armed is None:
        return
    wanted, _, action = armed.partition("=")
    if wanted not in FAILPOINTS:
        raise SettingsError(f"failpoint {armed!r}: no such point; known: {', '.join(FAILPOINTS)}")
    if wanted != name:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "abort":
        os.abort()
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action.startswith("sleep:"):
        time.sleep(float(action.removeprefix("sleep:")))
    else:
        raise SettingsError(f"failpoint {armed!r}: use kill, abort, enospc or sleep:SECONDS")
