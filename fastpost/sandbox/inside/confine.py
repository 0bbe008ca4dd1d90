"""All that a process gives up before it runs what it was not written by."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from typing import Any

from landlock import restrict_files
from seccomp import restrict_calls

SET_PDEATHSIG, SET_NO_NEW_PRIVS = 1, 38
OPEN_FILES = 64
# The interpreter's own library, and what its extension modules link to.
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom")


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    resource.setrlimit(kind, (soft, soft if hard is None else hard))


def confine(limits: dict[str, Any], parent: int) -> None:
    """CPU, memory, file size; ends with the parent; no file but the library's and the working directory's; no calls but
    the harmless. The order: the last takes away what the others need."""
    libc = ctypes.CDLL(None)
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the process that asked has ended")
    _limit(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)  # SIGXCPU can be caught, SIGKILL not
    _limit(resource.RLIMIT_AS, limits["memory_bytes"])
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    if libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("PR_SET_NO_NEW_PRIVS was refused")
    restrict_files((os.path.join(sys.base_prefix, "lib"), *sys.path, *LIBRARIES), os.getcwd())
    restrict_calls()
