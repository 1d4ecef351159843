"""A judge behind the OpenAI chat protocol: one question, one answer, and patience with what goes wrong.

Passing faults (429, 408, 5xx, time-outs, connections that break, replies that are none) are tried again after
an exponential wait with jitter, or as long as Retry-After says. Any other status fails at once: asking again
would bring the same.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit, urlunsplit

import openai

from decdec_core.config import DecDECError

OPENAI_URL = "https://api.openai.com/v1"
TEMPERATURE = 0
MAX_TOKENS = 2048  # of a judgment, as in FastChat

_FIRST_WAIT_S, _LARGEST_WAIT_S = 1.0, 60.0
_LARGEST_RETRY_AFTER_S = 600.0  # a judge that asks for more is out of quota: better to end, and resume later
_OF_THE_REQUEST = (400, 413, 422)  # statuses that another request may not have
_LARGEST_MESSAGE = 300  # characters of a server's error that are shown


class RefusedError(DecDECError):
    """The judge's server refuses whatever it is asked: another key, name or day is needed."""


class NoJudgmentError(DecDECError):
    """This request has no answer, others may: a fault that did not pass within the retries, or one that the
    server finds in the request, such as its length."""


class _PassingFault(Exception):
    """What may go well the next time. retry_after_s: what the server asks for, if it does."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JudgeClient:
    """Asks `model` at `base_url`. Several threads may ask at once.

    The key is $OPENAI_API_KEY; servers other than OpenAI's may need none. timeout_s: without a byte from the
    server. retries: after the first try. What is refused raises DecDECError.
    """

    def __init__(self, model: str, base_url: str | None, timeout_s: float, retries: int) -> None:
        self.model, self.timeout_s, self.retries = model, timeout_s, retries
        url = base_url or OPENAI_URL
        self.shown_url = without_credentials(url)
        self._key = os.environ.get("OPENAI_API_KEY") or ""
        if not self._key and base_url is None:
            raise DecDECError(f"OPENAI_API_KEY must be set for {self.shown_url}, got nothing")
        self._jitter = random.Random()
        # the package's own retries would hide how often and why a judge was asked again
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=url, timeout=timeout_s, max_retries=0
        )

    def ask(self, system: str, user: str, stopped: threading.Event) -> str:
        """Return the judge's answer. stopped: when it is set, no other try is waited for. Raises RefusedError
        or NoJudgmentError."""
        for attempt in range(self.retries + 1):
            try:
                return self._once(system, user)
            except _PassingFault as error:
                fault = error
            if attempt == self.retries:
                break
            if (fault.retry_after_s or 0) > _LARGEST_RETRY_AFTER_S:
                raise RefusedError(
                    f"judge {self.model} at {self.shown_url} must be back within "
                    f"{_LARGEST_RETRY_AFTER_S:.0f} s, got Retry-After {fault.retry_after_s:.0f} s "
                    f"with {self._shown(fault)}"
                )
            if stopped.wait(self._wait_s(attempt, fault.retry_after_s)):
                break
        raise NoJudgmentError(
            f"judge {self.model} at {self.shown_url} must answer within {self.retries + 1} tries, "
            f"got at the last of {attempt + 1}: {self._shown(fault)}"
        )

    def _once(self, system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                temperature=TEMPERATURE,
                max_tokens=MAX_TOKENS,
            )
        except openai.APITimeoutError:
            raise _PassingFault(f"nothing for {self.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raise _PassingFault(f"{type(cause).__name__}: {cause}" if cause else str(error)) from None
        except openai.APIStatusError as error:
            status, shown = error.status_code, f"status {error.status_code}: {error.message}"
            if status in (408, 429) or status >= 500:
                raise _PassingFault(shown, retry_after_s(error.response.headers.get("retry-after"))) from None
            kind = NoJudgmentError if status in _OF_THE_REQUEST else RefusedError
            raise kind(
                f"judge {self.model} at {self.shown_url} must take the request, got {self._shown(shown)}"
            ) from None
        except (openai.APIError, ValueError, RecursionError) as error:  # the latter two: no JSON, or too deep
            raise _PassingFault(f"no chat completion: {type(error).__name__}: {error}") from None
        return _content(reply)

    def _wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Return how long to wait: never less than the server asks for, and not all threads as long."""
        jitter = 0.5 + self._jitter.random() / 2
        own = min(_FIRST_WAIT_S * 2.0**attempt, _LARGEST_WAIT_S) * jitter
        return own if asked_s is None else asked_s + jitter * _FIRST_WAIT_S

    def _shown(self, message: object) -> str:
        """Return one line of a server's words, without the key that it may repeat."""
        line = " ".join(str(message).split())
        return (line.replace(self._key, "[key]") if self._key else line)[:_LARGEST_MESSAGE]


def without_credentials(url: str) -> str:
    """Return `url` without user, password, query and fragment; one that is no http(s) URL raises DecDECError
    that repeats none of these."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https"):
        raise DecDECError("base-url must be http:// or https://, a host and a path, got something else")
    named = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, f"{named}:{port}" if port else named, parts.path, "", ""))


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header, a number or a date, asks for; None for any other."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _content(reply: object) -> str:
    """Return the text of a chat completion; a judge that refused, or that said nothing, has answered too."""
    try:
        message = reply.choices[0].message  # type: ignore[attr-defined]
        content = message.content if message.content is not None else message.refusal or ""
    except (AttributeError, IndexError, TypeError):
        shown = repr(reply) if isinstance(reply, str) else type(reply).__name__
        raise _PassingFault(f"no chat completion: {shown[:_LARGEST_MESSAGE]}") from None
    if not isinstance(content, str):
        raise _PassingFault(f"no chat completion: content of type {type(content).__name__}")
    return content
