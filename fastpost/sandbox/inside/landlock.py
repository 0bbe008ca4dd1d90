"""Files: Landlock, the kernel's own sandbox. A process may read what it has named and write in one directory, for good.

A right that is handled and not granted is denied, in every directory (man 7 landlock). Linux 5.13 and newer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, of the same number on every machine
VERSION, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << n for n in (1, 2, 3, 5, 8, 14))
READ = READ_FILE | READ_DIR
OF_FILES = (
    READ_FILE | WRITE_FILE | TRUNCATE
)  # the rest are rights of directories, and a rule of a file may not name them
WORK = READ | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE  # no directory in it, no link, pipe or socket
HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # by the version that the kernel speaks


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """That the kernel speaks; 0: none."""
    return max(0, ctypes.CDLL(None).syscall(CREATE_RULESET, None, 0, VERSION))


def _call(libc: ctypes.CDLL, *arguments: object) -> int:
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def restrict_files(readable: Iterable[str], work: str) -> None:
    """From here on this process opens what is under `readable` to read, and files directly in `work` to write too.

    Needs PR_SET_NO_NEW_PRIVS. What does not exist is left out.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handled = HANDLED[min(version(), max(HANDLED))]
    rules = ctypes.c_uint64(handled)
    ruleset = _call(libc, CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    for path, rights in [*((path, READ) for path in readable), (work, WORK), ("/dev/null", READ | WRITE_FILE)]:
        if not os.path.exists(path):
            continue
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = rights & handled & (-1 if os.path.isdir(path) else OF_FILES)
        _call(libc, ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(_Rule(allowed, opened)), 0)
        os.close(opened)
    _call(libc, RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
