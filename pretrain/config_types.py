"""Types that the sections of the configuration share: amounts, shares, import paths, the base of a section.

What lives here: how single values are checked. What must not: any key.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

# What may not be written down: user:password@ of a URL, and the parameters that carry a signature, a key or a token.
_USER = re.compile(r"(\w://)[^/\s@`'\"]+@")
_SECRET = re.compile(
    r"([?&;](?:x-(?:amz|goog|ms)-[\w-]*|[\w.-]*(?:token|secret|passw|pwd|auth|cred|signature|api_?key|accesskey)[\w.-]*"
    r"|sig|key|jwt|sas|code|policy|key-pair-id|expires)=)[^&;#\s`'\"]*",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")  # of a Hub


def redacted(text: str) -> str:
    """The text with `***` in place of what must stay secret: tokens of a Hub; in URLs passwords, keys, signatures."""
    text = _TOKEN.sub("***", text)
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", text)) if "://" in text else text


def _check_amount(value: object) -> str | int:
    """Accept `2%` of the run or a whole number of steps."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value) if isinstance(value, str) else None
    if match is None or float(match[1]) > 100:
        raise ValueError("give a share of the run such as 2%, or a whole number of steps")
    return f"{match[1]}%"


def check_import_path(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise ValueError("give an import path such as my_module:my_function")
    return value


def _check_interval(value: str | int) -> str | int:
    if value == 0 or (isinstance(value, str) and float(value.rstrip("%")) == 0):
        raise ValueError("give at least 1 step; a number above the run's steps means only at its end")
    return value


Amount = Annotated[
    str | int,
    AfterValidator(_check_amount),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}]}),
]
Interval = Annotated[Amount, AfterValidator(_check_interval)]
ImportPath = Annotated[str, AfterValidator(check_import_path)]
Place = Annotated[str, PlainSerializer(redacted, return_type=str, when_used="json")]
"""A path or a URL; what is written of it holds no password, key, token or signature."""
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


def amount_in_steps(amount: str | int, total_steps: int) -> int:
    """Turn `2%` or a number of steps into steps, of a run of `total_steps` steps (rounded to the nearest)."""
    if isinstance(amount, int):
        return amount
    return round(float(amount.rstrip("%")) / 100 * total_steps)


class Section(BaseModel):
    """Base of every section: strict, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
