"""The sandbox: ordinary programs run in it; what tries to break out is contained, named, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastpost import sandbox
from fastpost.sandbox import Limits, Outcome
from fastpost.sandbox.inside import landlock

sys.path.insert(0, str(Path(sandbox.__file__).parent / "inside"))  # as the sandbox's own process has it
import syscalls

sys.path.pop(0)

try:
    sandbox.check()
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

SMALL = Limits(seconds=60.0, cpu_seconds=1, memory_mb=256, files_mb=2, output_kb=64)  # seconds: of a busy machine


def run(source: str, stdin: str = "", limits: Limits = SMALL) -> Outcome:
    return sandbox.run(textwrap.dedent(source), stdin, limits)


def children() -> set[int]:
    """Processes that this one has started and that are still there."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_a_program_reads_and_prints():
    outcome = run("print(sum(map(int, input().split())))", "1 2 39")
    assert (outcome.status, outcome.stdout) == ("ok", "42\n")


def test_what_programs_use_is_there():
    source = """
        import asyncio, collections, concurrent.futures, ctypes, dataclasses, datetime, decimal, hashlib, itertools
        import heapq, json, math, os, random, re, signal, socket, sqlite3, string, tempfile, threading, time, typing

        @dataclasses.dataclass
        class Point:
            x: int

        async def later():
            await asyncio.sleep(0)
            return Point(3).x

        with tempfile.TemporaryFile() as file, open("notes.txt", "w") as notes:
            file.write(b"12")
            notes.write("kept")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            threads = list(pool.map(abs, [-1, 2]))
        print(asyncio.run(later()), threads, open("notes.txt").read(), os.listdir(), dict(os.environ))
        signal.signal(signal.SIGALRM, lambda *_: print("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.05)
    """
    outcome = run(source, limits=Limits())
    assert outcome.stdout == "3 [1, 2] kept ['notes.txt'] {'LC_CTYPE': 'C.UTF-8'}\nalarm\n", outcome.stderr


ENDLESS = {
    "a loop": ("while True: pass", "cpu"),
    "a loop that minds no signal": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "cpu",
    ),
    "sleep": ("import time; time.sleep(600)", "timeout"),
    "sleep with everything closed": (
        "import os, time\nos.close(0); os.close(1); os.close(2)\ntime.sleep(600)",
        "timeout",
    ),
    "a gigabyte printed": ("for _ in range(1 << 14): print('x' * (1 << 16))", "output"),
    "a gigabyte of errors": (
        "import sys\nfor _ in range(1 << 14): print('x' * (1 << 16), file=sys.stderr)",
        "output",
    ),
    "a gigabyte held": ("x = bytearray(1 << 30)", "memory"),
    "memory, piece by piece": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    "one big file": ("open('big', 'wb').write(bytes(3 << 20))", "error"),
    "many files": (
        "import time\nfor i in range(9): open(str(i), 'wb').write(bytes(1 << 20))\ntime.sleep(600)",
        "files",
    ),
    "many empty files": ("import time\nfor i in range(1 << 20): open(str(i), 'wb')", "files"),
    "files removed and kept open": (
        """
        import os, time
        kept = []
        for i in range(9):
            kept.append(open(str(i), 'wb', buffering=0))
            kept[-1].write(bytes(1 << 20))
            os.remove(str(i))
        time.sleep(600)
        """,
        "files",
    ),
    "threads": (
        """
        import threading, time
        threading.stack_size(1 << 15)
        while True: threading.Thread(target=time.sleep, args=(600,)).start()
        """,
        "threads",
    ),
    "a number of a billion digits": ("print(len(str(9 ** 9 ** 9)))", "cpu"),
    "a program that cannot be compiled": ("x = " + "(" * 10_000, "memory|error"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_ended(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source, status = ENDLESS[name]
    before = children()
    outcome = run(source, limits=replace(SMALL, seconds=1.0) if status == "timeout" else SMALL)
    assert re.fullmatch(status, outcome.status), outcome
    assert len(outcome.stdout) <= SMALL.output_kb << 10 and len(outcome.stderr) <= SMALL.output_kb << 10
    assert children() == before and not list(tmp_path.iterdir())


def refused(source: str, **names: object) -> None:
    """The program tries, and is told no: a PermissionError, or an error of the same number."""
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    outcome = run(head + textwrap.dedent(source))
    assert outcome.status == "error" and "DONE" not in outcome.stdout, outcome
    assert re.search(r"PermissionError|\[Errno 1\]|\[Errno 13\]|not allowed", outcome.stderr), outcome.stderr


def test_no_other_process_is_started():
    refused("import os\nwhile True: os.fork()")
    refused("import subprocess\nsubprocess.run(['/bin/true'])\nprint('DONE')")
    refused("import os\nos.execv('/bin/true', ['true'])")
    refused("import os\nos.posix_spawn('/bin/true', ['true'], {})\nprint('DONE')")
    refused("import multiprocessing as m\nm.get_context('fork').Process(target=print).start()\nprint('DONE')")
    refused("import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\nprint('DONE')")
    refused("import os\nos.setsid()\nprint('DONE')")


def test_no_file_outside_is_read_or_written(tmp_path):
    secret = tmp_path / "home" / "secret.txt"
    secret.parent.mkdir()
    secret.write_text("the key")
    refused("print(open(path).read(), 'DONE')", path=str(secret))
    refused("import os\nprint(os.listdir(path), 'DONE')", path=str(secret.parent))
    refused("open(path, 'w')\nprint('DONE')", path=str(secret))
    refused("open(path + '.new', 'x')\nprint('DONE')", path=str(secret))
    refused("import os\nos.remove(path)\nprint('DONE')", path=str(secret))
    refused("import os\nos.truncate(path, 0)\nprint('DONE')", path=str(secret))
    refused("import os\nos.open(path, os.O_RDONLY | os.O_TRUNC)\nprint('DONE')", path=str(secret))
    refused("import os\nos.chmod(path, 0o777)\nprint('DONE')", path=str(secret))
    refused("import os\nos.utime(path)\nprint('DONE')", path=str(secret))
    refused("import os\nos.symlink(path, 'link')\nprint(open('link').read(), 'DONE')", path=str(secret))
    refused("import os\nos.link(path, 'link')\nprint(open('link').read(), 'DONE')", path=str(secret))
    refused("import os\nos.rename(path, 'mine')\nprint('DONE')", path=str(secret))
    refused("import os\nos.mkdir('deep')\nprint('DONE')")
    refused("print(open(f'/proc/{pid}/environ').read(), 'DONE')", pid=os.getpid())
    refused("open(f'/proc/{pid}/mem', 'r+b')\nprint('DONE')", pid=os.getpid())
    refused("open('/proc/self/mem', 'r+b')\nprint('DONE')")
    refused("print(open('/etc/passwd').read(), 'DONE')")
    assert secret.read_text() == "the key" and [p.name for p in secret.parent.iterdir()] == ["secret.txt"]


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        refused("import socket\nsocket.create_connection(('127.0.0.1', port))\nprint('DONE')", port=port)
        refused("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 1))")
        refused("import socket\nsocket.socket(socket.AF_UNIX)\nprint('DONE')")
        refused("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nprint('DONE')")
        refused("import urllib.request\nurllib.request.urlopen(f'http://127.0.0.1:{port}')", port=port)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_no_signal_reaches_another_process():
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        refused("import os\nos.kill(pid, 9)\nprint('DONE')", pid=victim.pid)
        refused("import os\nos.kill(os.getppid(), 9)\nprint('DONE')")
        refused("import os\nos.kill(-1, 9)\nprint('DONE')")
        refused("import os\nos.killpg(pgid, 9)\nprint('DONE')", pgid=os.getpgid(victim.pid))
        # F_SETOWN and F_SETSIG: "send this process signal 9 when the pipe has something to read".
        refused("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, pid)\nprint('DONE')", pid=victim.pid)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    outcome = run("import os, signal\nsignal.signal(10, lambda *_: print('mine'))\nos.kill(os.getpid(), 10)")
    assert outcome.stdout == "mine\n"


def test_no_limit_is_raised_and_no_call_by_number_gets_through():
    refused("import mmap\nmmap.mmap(-1, 4096).madvise(100)\nprint('DONE')")  # MADV_HWPOISON, which root may
    refused("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))\nprint('DONE')")
    direct = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(*call) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        print('DONE')
    """
    if os.uname().machine == "x86_64":
        # ptrace, io_uring_setup, process_vm_writev, memfd_create, unshare, mount, bpf, userfaultfd, and socket as x32
        for number in (101, 425, 311, 319, 272, 165, 321, 323, 41 | 1 << 30):
            refused(direct, call=[number, 1, 2, 3, 4, 5])


def test_it_ends_with_the_process_that_asked():
    """Killed, its parent takes it along."""
    script = (
        "from fastpost import sandbox; sandbox.run('import os, time; print(os.getpid(), flush=True); time.sleep(600)')"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=Path(sandbox.__file__).parents[2])
    try:
        pid = wait_for(lambda: Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())[0]
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not Path(f"/proc/{pid}/cwd").exists())
    finally:
        parent.kill()


def wait_for(found, seconds: float = 30.0):
    since = time.monotonic()
    while not (value := found()):
        assert time.monotonic() - since < seconds
        time.sleep(0.02)
    return value


def test_limits_name_what_is_wrong():
    with pytest.raises(ValueError, match="memory_mb must be above 0, got 0"):
        Limits(memory_mb=0)
    with pytest.raises(ValueError, match=r"cpu_seconds must be a whole number, got 0\.5"):
        Limits(cpu_seconds=0.5)  # type: ignore[arg-type]


def test_a_machine_that_cannot_confine_refuses(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"needs Landlock.*Linux 5\.13"):
        patch.setattr(landlock, "version", lambda: 0)
        sandbox.check()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="on Linux on x86_64 or aarch64 only"):
        patch.setattr("platform.machine", lambda: "riscv64")
        sandbox.check()


HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_system_calls_are_the_kernel_s(machine):
    header = Path("/usr/include") / HEADERS[machine]
    if not header.exists():
        pytest.skip(f"{header} is not installed")
    text = header.read_text()
    known = {int(number): name for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    table = syscalls.numbers(syscalls.HARMLESS, machine) | syscalls.numbers(syscalls.RULED, machine)
    other = {"newfstatat": "fstatat"}  # aarch64's own name for it
    assert {name: known[number] for name, number in table.items() if known[number] != other.get(name)} == {
        name: name for name, number in table.items() if known[number] != other.get(name)
    }
