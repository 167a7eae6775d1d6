"""Secrets that must not leave this machine: found in text that would be sent, and taken out of messages.

What lives here: what a token, a key or a password looks like. What must not: reading directories.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

from pretrain.config_types import redacted

_PATTERNS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a Hugging Face token of an organization": r"\bapi_org_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "an OpenAI or Anthropic key": r"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"\w://[^/\s:@`'\"]+:[^/\s@`'\"]+@",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _PATTERNS.items()}
_NAMED = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY)$|^(?:TOKEN|SECRET|PASSWORD)_", re.IGNORECASE
)
_SHORTEST = 12  # characters: shorter values of the environment are words that stand in any text
_LIBRARY = "huggingface_hub"


def secrets_in(text: str) -> Iterator[str]:
    """What a text holds that is secret, in words; never the secret itself.

    Known forms of tokens and keys, and the values of this process's environment whose names say that they are secret
    (`HF_TOKEN`, `WANDB_API_KEY`, ...).
    """
    for name, pattern in _COMPILED.items():
        if pattern.search(text):
            yield name
    for name, value in _environment():
        if value in text:
            yield f"the value of {name}"


def holds_token(text: str) -> bool:
    """Whether a text, a repository's name say, has a token or a password in it."""
    return next(secrets_in(text), None) is not None


def without_secrets(text: str) -> str:
    """The text with `***` in place of everything secret, for messages: signatures of URLs too."""
    for _, value in _environment():
        text = text.replace(value, "***")
    for pattern in _COMPILED.values():
        text = pattern.sub("***", text)
    return redacted(text)


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if _NAMED.search(name) and len(value.strip()) >= _SHORTEST:
            yield name, value.strip()


class _Redacting(logging.Filter):
    """Takes secrets out of what a library logs: it shows the URLs of uploads, which are signed."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


def redact_library() -> None:
    """Let huggingface_hub log nothing secret; may be called often."""
    for handler in (*logging.getLogger(_LIBRARY).handlers, *logging.getLogger().handlers):
        if not any(isinstance(entry, _Redacting) for entry in handler.filters):
            handler.addFilter(_Redacting())
