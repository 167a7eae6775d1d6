"""datatrove's filters by the name of their class: checked before any work, then asked about each document.

What lives here: names and parameters to filters, and the judgement of one document. What must not: datatrove's readers
and writers, or which documents a judgement is asked for.

Filters judge the documents of the training files, those that are held out of them for validation too: a validation
set that is a share of the training text is a share of what is trained on. Which side a document is on is decided by
its text as it was read, so the same ones are held out whatever the filters. Validation files that are named in the
configuration are never filtered: an evaluation text is what it is.

A filter starts anew with each part of the text, with `seed` 0 where it draws at random and the configuration gives no
seed, so its judgements do not depend on who works on which part. Some filters change a text that they keep
(C4QualityFilter drops lines); what they make of it goes on. A filter that fails on a document (a division by the
number of its words, say) leaves it out, and the failure is the reason that is counted.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_origin, get_type_hints

from datatrove.data import Document as PipelineDocument
from datatrove.pipeline import filters as datatrove_filters
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from pretrain.config_data import FilterStep
from pretrain.plugins import import_path

_NOT_OURS = ("exclusion_writer", "batch_size")  # samples of what was removed are kept whatever the filter
_PROBE = """The committee met on Tuesday and talked about the harvest, which was better than in the year before.
Most of the farmers were there; they agreed to share the new mill with the villages along the river.
An engineer explained how grain is dried, and why rooms that have no windows should be avoided for storage.
Nobody objected when the treasurer asked for money, because prices in town have risen since spring.
After supper somebody sang, children fell asleep on benches, and everyone walked home under a clear sky.
"""  # passes the usual thresholds, so that every part of a filter is reached
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, re.error)


def known_filters() -> dict[str, type[BaseFilter]]:
    """datatrove's filters by the name of their class."""
    return {
        name: value
        for name, value in sorted(vars(datatrove_filters).items())
        if inspect.isclass(value) and issubclass(value, BaseFilter) and value is not BaseFilter
    }


def filter_labels(steps: Sequence[FilterStep]) -> list[str]:
    """A name for each filter: that of its class, numbered where one comes again."""
    names = [step.name for step in steps]
    return [
        name if names[:place].count(name) == 0 else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


def check_filters(steps: Sequence[FilterStep]) -> None:
    """Make each filter and let it judge a document, so that what it lacks shows before any work.

    Raises:
        ValueError: for an unknown filter or parameter, a value of the wrong type, a package or a download that is not
            there; names the key and the remedy.
    """
    for number, step in enumerate(steps):
        key = f"data.filters[{number}] ({step.name})"
        judge = make_filter(step, key)
        with _explained(key, " cannot judge a document of plain text"):
            judge.filter(PipelineDocument(_PROBE, "probe"))


@contextmanager
def _explained(key: str, failure: str) -> Iterator[None]:
    """What goes wrong in a filter's own code, as an error that names its key and the remedy."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{key} needs a package that is not installed: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{key} needs a download that failed: {error}; check the connection, or fill the cache elsewhere"
        ) from error
    except _FAILURES as error:
        raise ValueError(f"{key}{failure}: {error}") from error


def make_filter(step: FilterStep, key: str = "data.filters") -> BaseFilter:
    """The filter that a step of the configuration names.

    Raises:
        ValueError: as `check_filters` does.
    """
    known = known_filters()
    if step.name not in known:
        short = {name.removesuffix("Filter").lower(): name for name in known}
        near = difflib.get_close_matches(step.name.removesuffix("Filter").lower(), short, n=1, cutoff=0.0)
        raise ValueError(
            f"{key}: datatrove has no filter `{step.name}`; the nearest is {short[near[0]]} of {', '.join(known)}"
        )
    kind = known[step.name]
    parameters = _checked(kind, step.parameters, key)
    with _explained(key, ".parameters"):
        return kind(**parameters)


def _checked(kind: type[BaseFilter], given: dict[str, Any], key: str) -> dict[str, Any]:
    """The parameters, compared with the constructor's signature."""
    signature = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in _NOT_OURS
    }
    checked = check_arguments(kind, signature, given, f"{key}.parameters")
    if missing := [name for name, one in signature.items() if one.default is one.empty and name not in given]:
        raise ValueError(f"{key}.parameters: `{missing[0]}` is missing; {kind.__name__} needs it")
    if "seed" in signature and checked.get("seed") is None:
        checked["seed"] = 0
    return checked


def check_arguments(
    function: Any, signature: dict[str, inspect.Parameter], given: dict[str, Any], key: str
) -> dict[str, Any]:
    """Compare arguments from a configuration with a signature; import paths become the functions they name.

    Raises:
        ValueError: for a name that it lacks, or a value that does not fit its annotation; names the key.
    """
    hints = get_type_hints(inspect.unwrap(getattr(function, "__init__", function)))
    checked = {}
    for name, value in given.items():
        if name not in signature:
            near = difflib.get_close_matches(name, signature, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{key}: no parameter `{name}`; {hint}known are {', '.join(signature)}")
        wanted = hints.get(name, Any)
        if get_origin(wanted) is collections.abc.Callable and isinstance(value, str):
            checked[name] = import_path(value)
            continue
        default = signature[name].default
        if default is None:
            wanted |= None
        elif default is not inspect.Parameter.empty and _fitted(default, wanted)[1] is not None:
            wanted = type(default)  # the annotation belies its own default
        checked[name], problem = _fitted(value, wanted)
        if problem is not None:
            raise ValueError(f"{key}.{name}: {value!r} does not fit {_plain(wanted)} ({problem})")
    return checked


def _fitted(value: Any, wanted: Any) -> tuple[Any, str | None]:
    """A value as one of a type (a list as a tuple, which YAML lacks), and why it is none, if it is none."""
    try:
        return TypeAdapter(wanted).validate_json(json.dumps(value), strict=True), None
    except ValidationError as error:
        return value, str(error.errors()[0]["msg"])
    except (PydanticSchemaGenerationError, TypeError):  # a type of datatrove's own: the constructor says more
        return value, None


def _plain(kind: Any) -> str:
    return kind.__name__ if inspect.isclass(kind) else str(kind).replace("typing.", "")


class Judge:
    """The configured filters, made anew for a part."""

    def __init__(self, steps: Sequence[FilterStep]) -> None:
        self._filters = [(label, make_filter(step)) for label, step in zip(filter_labels(steps), steps, strict=True)]
        self.labels = [label for label, _ in self._filters]

    def judge(self, text: str, where: str) -> tuple[str | None, list[str], str]:
        """Ask the filters in order about a text.

        Returns:
            The text, as they leave it, or None when one leaves it out; the filters that kept it; and the reason.
        """
        document = PipelineDocument(text, where)
        passed: list[str] = []
        for label, one in self._filters:
            try:
                kept, reason = get_filter_result(one.filter(document))
            except _FAILURES as error:
                kept, reason = False, f"the filter fails with {type(error).__name__}: {error}"
            if not kept or not document.text.strip():
                return None, passed, str(reason or ("no text is left" if kept else "no reason given"))
            passed.append(label)
        return document.text, passed, ""
