"""System calls: a filter that lets through what is known to be harmless, and answers EPERM to all the rest.

So there is no socket, no new process, no program, no signal to another process, no limit raised: not because each was
thought of, but because none is on the list. A few are on it with conditions on arguments, (argument & mask) == value.
The filter is a program in classic BPF, which the kernel runs before each call, and which nothing takes off again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

from syscalls import HARMLESS, MACHINES, RULED, numbers

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06  # BPF: 32 bits of the call; & constant; jump where equal; verdict
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER_AT, ARCH_AT, ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data
ARCHES: dict[str, int] = dict(
    zip(MACHINES, (0xC000003E, 0xC00000B7), strict=True)
)  # a call by another's numbers ends the process
SET_SECCOMP, FILTER = 22, 2

WHOLE = 0xFFFFFFFF
Condition = tuple[int, int, int]  # argument, mask, value
Step = tuple[int, int, int, int]  # code, jump where true, jump where false, constant
THREAD, NAMESPACES = 0x00010000, 0x7E020080
# To duplicate, to close on exec, flags, locks. Not F_SETOWN and F_SETSIG, by which the kernel signals other processes.
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # terminal? its size, bytes waiting, blocking, on exec
UNIX, STREAM = 1, 1  # a pair of stream sockets, which event loops wake themselves by, has no way to any other address


def _rules() -> dict[str, list[list[Condition]]]:
    """System call -> alternatives, each the conditions that all hold."""
    me = os.getpid()
    return {
        "open": _opening(1),
        "openat": _opening(2),
        "clone": [[(0, THREAD | NAMESPACES, THREAD)]],
        "fcntl": [[(1, WHOLE, command)] for command in FCNTL],
        "ioctl": [[(1, WHOLE, request)] for request in IOCTL],
        "kill": [[(0, WHOLE, me)]],
        "tgkill": [[(0, WHOLE, me)]],
        "madvise": [[(2, WHOLE ^ 0x1F, 0)]],  # advice; from 100 on root poisons pages, which others may share
        "socketpair": [[(0, WHOLE, UNIX), (1, 0xF, STREAM)]],
    }


def _opening(flags: int) -> list[list[Condition]]:
    """Landlock rules on the path. Its first two versions let a file be truncated that is opened only to be read."""
    either = [[(flags, os.O_ACCMODE, mode)] for mode in (os.O_WRONLY, os.O_RDWR)]
    return [[(flags, os.O_TRUNC, 0)], *either]


def _allowed(number: int, conditions: list[Condition]) -> list[Step]:
    """ALLOW where it is this call and all conditions hold; else on to what follows."""
    block = [(LOAD, NUMBER_AT), (EQUAL, number)]
    for argument, mask, value in conditions:
        block += [(LOAD, ARGUMENTS_AT + 8 * argument), (AND, mask), (EQUAL, value)]
    block += [(RETURN, ALLOW)]
    return [(code, 0, len(block) - 1 - i if code == EQUAL else 0, k) for i, (code, k) in enumerate(block)]


def filter_program(machine: str) -> list[Step]:
    """The whole filter."""
    calls, ruled = numbers(HARMLESS, machine), numbers(RULED, machine)
    program = [(LOAD, 0, 0, ARCH_AT), (EQUAL, 1, 0, ARCHES[machine]), (RETURN, 0, 0, KILL)]
    for number in calls.values():
        program += _allowed(number, [])
    for name, alternatives in _rules().items():
        for conditions in alternatives if name in ruled else ():
            program += _allowed(ruled[name], conditions)
    # As if it did not exist: the C library then asks for a thread by clone, whose flags a filter can read.
    program += [(LOAD, 0, 0, NUMBER_AT), (EQUAL, 0, 1, ruled["clone3"]), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    return [*program, (RETURN, 0, 0, REFUSE | errno.EPERM)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def restrict_calls() -> None:
    """From here on, for good. Needs PR_SET_NO_NEW_PRIVS."""
    code = b"".join(struct.pack("=HBBI", *step) for step in filter_program(platform.machine()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
