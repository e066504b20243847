"""A model that rates answers, behind an OpenAI-compatible HTTP endpoint."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rankwise.errors import DataError

logger = logging.getLogger(__name__)

_LOCAL = ("localhost", "127.0.0.1", "::1")
_PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that another attempt may mend."""

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_TASK = (
    "[Instruction]\nPlease act as an impartial judge and evaluate the quality of the response "
    "provided by an AI assistant to the user question displayed below."
)
_FORMAT = (
    "Be as objective as possible. After providing your explanation, you must rate the response on "
    'a scale of 1 to 10 by strictly following this format: "[[rating]]", for example: '
    '"Rating: [[5]]".'
)
_FACTORS = (
    " Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, "
    "creativity, and level of detail of the response. Begin your evaluation by providing a short "
    "explanation. "
)
_WITH_REFERENCE = (
    " Your evaluation should consider correctness and helpfulness. You will be given a reference "
    "answer and the assistant's answer. Begin your evaluation by comparing the assistant's answer "
    "with the reference answer. Identify and correct any mistakes. "
)


def judge_prompt(question: str, answer: str, reference: str = "") -> str:
    """MT-Bench's single answer grading (Zheng et al. 2023, figures 6 and 8, `single-v1`)."""
    shown = f"\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
    if not reference:
        return f"{_TASK}{_FACTORS}{_FORMAT}\n\n[Question]\n{question}{shown}"
    right = f"\n\n[The Start of Reference Answer]\n{reference}\n[The End of Reference Answer]"
    return f"{_TASK}{_WITH_REFERENCE}{_FORMAT}\n\n[Question]\n{question}{right}{shown}"


@dataclass(frozen=True)
class Judge:
    """Who rates, and where it is asked.

    Attributes:
        model: As the endpoint names it.
        endpoint: Base address, such as `https://api.openai.com/v1`.
        key_variable: Environment variable that holds the key; empty for none. The key is read when
            it is sent, is never logged, and is sent in the clear to this machine only.
        attempts: How often one answer is sent before giving up.
        wait: Seconds before the second attempt; each further wait is twice as long.
        timeout: Seconds for one reply.
    """

    model: str
    endpoint: str
    key_variable: str = "OPENAI_API_KEY"
    attempts: int = 4
    wait: float = 2.0
    timeout: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(f"endpoint={self.endpoint!r} must be an http or https address.")
        if parts.username or parts.password:
            raise DataError("endpoint: a key does not belong into the address; use key_variable.")
        if parts.scheme == "http" and self.key_variable and parts.hostname not in _LOCAL:
            raise DataError(f"endpoint={self.endpoint!r}: no key is sent unencrypted; use https.")

    def check_key(self) -> None:
        """Find out before any work whether there is a key.

        Raises:
            DataError: The environment variable is not set.
        """
        if self.key_variable and not os.environ.get(self.key_variable):
            raise DataError(
                f"the judge's key is expected in the environment variable {self.key_variable}, "
                "which is not set; key_variable='' is for endpoints without keys."
            )

    def rate(self, question: str, answer: str, reference: str = "") -> float:
        """A rating from 1 to 10.

        Raises:
            DataError: No reply, or none with a rating, after all attempts.
        """
        prompt = judge_prompt(question, answer, reference)
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                logger.info("judge %s: %s; attempt %d", self.model, reason, attempt + 1)
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                reply = self._ask(prompt)
            except _PassingError as error:
                reason = str(error)
                continue
            found = _RATING.search(reply)
            if found and 1 <= float(found.group(1)) <= 10:
                return float(found.group(1))
            reason = f"a reply without a rating from 1 to 10: {reply[:80]!r}"
        raise DataError(f"judge {self.model}: {reason} (after {self.attempts} attempts).")

    def _ask(self, prompt: str) -> str:
        self.check_key()
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
        }
        address = self.endpoint.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return _content(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                message = f"{address} answered {error.code} {error.reason}"
            if error.code in _PASSING:
                raise _PassingError(message) from None
            raise DataError(f"judge {self.model}: {message}.") from None
        except (OSError, json.JSONDecodeError) as error:
            raise _PassingError(f"{address} cannot be reached or read ({error})") from None


class _PassingError(Exception):
    """What another attempt may mend."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected request would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _content(reply: Any) -> str:
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise DataError(f"the judge's reply has no message content: {str(reply)[:80]!r}.")
    return content
