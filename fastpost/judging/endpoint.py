"""A judge behind an HTTP endpoint: POST {endpoint}/chat/completions, by OpenAI's names, a few requests at a time.

What may pass is tried again: nobody there, no answer in time, a broken one, status 408, 409, 425, 429 or 5xx. The wait
before the k-th trial is drawn from (0, backoff 2^k), so that many who were turned away do not come back together, and
is at least what the server asks for by Retry-After. What a key or an address cannot mend is an error at once; so is an
endpoint that nobody reaches any more. Else a request that fails is a reply that says why.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import accumulate
from typing import Any

from fastpost.judging.asking import Reply
from fastpost.judging.transport import posted
from fastpost.judging.wording import Request, verdict_at

LONGEST_WAIT = 120.0  # seconds, whatever the server asks for
BUSY = {408, 409, 425, 429}
SETTLED = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405}  # the same for every request
UNREACHED = "cannot be reached"


class _Again(Exception):
    """This may pass; `wait`: seconds that the server asks for."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class _Refused(Exception):
    """This question is, and would be again."""


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask, and with how much patience."""

    url: str
    model: str
    temperature: float
    max_tokens: int
    seed: int
    logprobs: bool
    timeout: float
    retries: int
    backoff: float
    concurrency: int
    key: str | None = field(default=None, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Replies as they come."""
        unreached = 0
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            pending = {pool.submit(self._reply, request): i for i, request in enumerate(requests)}
            for done in as_completed(pending):
                reply = done.result()
                yield pending[done], reply
                unreached = unreached + 1 if (reply.error or "").startswith(UNREACHED) else 0
                if unreached >= min(len(requests), self.concurrency):
                    raise ValueError(f"the judge's endpoint {self.url} {reply.error}")
        finally:
            pool.shutdown(cancel_futures=True)

    def _reply(self, request: Request) -> Reply:
        body, why = json.dumps(self._body(request)).encode(), ""
        for trial in range(self.retries + 1):
            try:
                return _read(self._answered(body), request)
            except _Refused as refused:
                return Reply(error=str(refused))
            except _Again as again:
                why = str(again)
                if trial < self.retries:
                    self.sleep(max(again.wait, self.backoff * 2**trial * random.random()))
        return Reply(error=why)

    def _body(self, request: Request) -> dict[str, Any]:
        asked = {"model": self.model, "messages": list(request.messages), "seed": self.seed + request.vote}
        asked |= {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return asked | ({"logprobs": True, "top_logprobs": 20} if self.logprobs else {})

    def _answered(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            answer = posted(f"{self.url.rstrip('/')}/chat/completions", body, headers, self.timeout)
        except (OSError, http.client.HTTPException) as error:
            raise _again(error, self.timeout) from None
        if 200 <= answer.status < 300:
            return answer.body
        said = " ".join(answer.body.decode(errors="replace").split())[:200]
        why = f"answers HTTP {answer.status}{f': {said}' if said else ''}"
        if answer.status in BUSY or answer.status >= 500:
            raise _Again(why, retry_after(answer.retry_after))
        if answer.status in SETTLED:
            raise ValueError(f"the judge's endpoint {self.url} {why}")
        raise _Refused(why)  # this one: it may be too long, and others are not


def _again(error: OSError | http.client.HTTPException, timeout: float) -> _Again:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return _Again(f"gives no answer within {timeout:g} seconds")
    if isinstance(error, urllib.error.URLError):
        return _Again(f"{UNREACHED}: {reason}")
    return _Again(f"breaks off: {type(error).__name__}: {error}")


def retry_after(said: str | None) -> float:
    """Seconds, of a number of them or of a date."""
    said = (said or "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else 0.0


def _read(body: bytes, request: Request) -> Reply:
    """A chat completion; anything else may be a server that is not well, and is asked again."""
    try:
        answer = json.loads(body)
        choice = min(answer["choices"], key=lambda choice: choice.get("index", 0))
        text = choice["message"].get("content") or ""
        assert isinstance(text, str)
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise _Again(f"answers what is no chat completion: {body[:80]!r}") from None
    return Reply(text, _told(choice.get("logprobs"), request))


def _told(logprobs: Any, request: Request) -> dict[str, float] | None:
    """Log-probabilities of the options at the token of the verdict; None where it was not told, or where a token
    may be less than an option, as 1 of 10."""
    if any(one != other and other.startswith(one) for one in request.options for other in request.options):
        return None
    try:
        tokens = logprobs["content"]
        found = verdict_at("".join(token["token"] for token in tokens), request)
        if found is None:
            return None
        ends = accumulate(len(token["token"]) for token in tokens)
        token = next(token for token, end in zip(tokens, ends, strict=True) if end > found[0])
        likely: dict[str, float] = {}
        for one in token["top_logprobs"]:
            name = one["token"].strip(" *_`\"'([\n")
            if name in request.options:
                likely[name] = likely.get(name, 0.0) + math.exp(one["logprob"])
    except (KeyError, TypeError, AttributeError, StopIteration):
        return None
    return {name: math.log(share) for name, share in likely.items() if share > 0} or None
