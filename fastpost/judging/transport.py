"""A POST that ends in time: with an answer, or with an error.

A socket's own time-out begins again with each byte, and some servers drip. So the connection hangs up where the head of
an answer is not there in time, and the body is read to a deadline. A redirection is not followed: the key in the
headers is for the server that it was given for.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

LARGEST = 16 * 2**20  # bytes of an answer


@dataclass(frozen=True)
class Answer:
    """Of a server, be it good or bad."""

    status: int
    retry_after: str | None
    body: bytes


def _punctual(kind: type[http.client.HTTPConnection], timeout: float) -> type[http.client.HTTPConnection]:
    """The same connection, which does not wait longer for the head of an answer."""

    class Punctual(kind):
        def getresponse(self) -> http.client.HTTPResponse:
            late = threading.Event()

            def hang_up() -> None:
                late.set()
                with contextlib.suppress(OSError, AttributeError):  # it was closed in the same moment
                    self.sock.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(timeout, hang_up)
            timer.start()
            try:
                return super().getresponse()
            except (OSError, http.client.HTTPException):
                if late.is_set():
                    raise TimeoutError from None
                raise
            finally:
                timer.cancel()

    return Punctual


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_punctual(http.client.HTTPConnection, float(req.timeout or 0)), req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_punctual(http.client.HTTPSConnection, float(req.timeout or 0)), req)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _within(response: Any, deadline: float) -> bytes:
    """All of the body."""
    parts, size = [], 0
    while part := response.read1(65_536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > LARGEST:
            raise OSError(f"more than {LARGEST} bytes")
    return b"".join(parts)


def posted(url: str, body: bytes, headers: dict[str, str], timeout: float) -> Answer:
    """What the server answers. TimeoutError, another OSError or an http.client.HTTPException where it does not."""
    request = urllib.request.Request(url, body, headers)
    opener = urllib.request.build_opener(_Stay, _Plain, _Secure)
    try:
        response: Any = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error  # which is a response as well
    with response:
        text = _within(response, time.monotonic() + timeout)
        return Answer(response.status, response.headers.get("Retry-After"), text)
