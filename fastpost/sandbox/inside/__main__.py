"""python -I -S inside '{"role": ..., "bytes": ..., "limits": ..., "parent": ..., "fds": ...}' < payload and input."""

from __future__ import annotations

import json
import os
import sys

from confine import confine
from roles import ROLES


def _payload(length: int) -> bytes:
    """The first bytes of stdin, and not one more: the rest is the program's."""
    parts: list[bytes] = []
    while length and (part := os.read(0, length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def main() -> None:
    told = json.loads(sys.argv[1])
    sys.path.pop(0)  # where this file is: its modules are imported, and no other program's
    confine(told["limits"], told["parent"])
    payload = json.loads(_payload(told["bytes"]))
    ROLES[told["role"]](payload, *told["fds"])


if __name__ == "__main__":
    main()
