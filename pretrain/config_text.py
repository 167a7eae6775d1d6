"""Text in, text out for run configurations: the YAML 1.2 reader, and messages that name key, value and remedy.

What lives here: scalars as YAML 1.2 reads them, and the translation of pydantic's complaints. What must not: the
schema itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """A run configuration that cannot be used; the message names key, value, nearest known key and remedy."""


def describe_errors(error: ValidationError, known: Sequence[str]) -> list[str]:
    """One line for each mistake that a validation found; `known` are all dotted keys of the schema."""
    return list(dict.fromkeys(_describe(problem, known) for problem in _most_telling(error, known)))


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 (core schema), `_` in numbers, and duplicate keys refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base class's form)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.)$"
    ),
    list("-+.0123456789"),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    mapping: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key `{key}` stands twice; remove one of them")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


class _Dumper(yaml.SafeDumper):
    """Quotes a text that our reader would take for a number or a truth value."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_yaml(value: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def parse_yaml(text: str, origin: str = "configuration") -> Any:
    """Parse YAML 1.2 text.

    Raises:
        ConfigError: on a syntax error or a key that stands twice; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {_what_is_wrong(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error


def _what_is_wrong(error: yaml.YAMLError) -> str:
    """A syntax error and its place, without the text there: a piece of a URL may be a piece of its password."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    said = " ".join(filter(None, (error.context and f"{error.context},", error.problem)))
    return f"{said} (line {mark.line + 1}, column {mark.column + 1})"


_VARIANT = re.compile(
    r"^(function|tagged|union|tuple|str|int|float|bool|literal|none|constrained|Source|DocumentStart|ValidationSplit"
    r"|classification|regression|token-classification|question-answering|multiple-choice|text-to-text|instructions"
    r"|embeddings)\b.*[\[(]?"
)


def _path_of(problem: Any, known: Sequence[str]) -> str:
    """The dotted key of a problem, without pydantic's names for the branches of a union."""
    parts: list[str] = []
    for part in problem["loc"]:
        if isinstance(part, int):
            parts.append(f"[{part}]")
        elif not (_VARIANT.match(part) and f"{'.'.join(parts)}.{part}" not in known):
            parts.append(part)
    return ".".join(parts).replace(".[", "[")


def _most_telling(error: ValidationError, known: Sequence[str]) -> list[Any]:
    """Of the many complaints that a union gives for one key, keep the unknown key if there is one, else merge."""
    by_key: dict[str, list[Any]] = {}
    for problem in error.errors():
        by_key.setdefault(re.sub(r"\[\d+\]$", "", _path_of(problem, known)), []).append(problem)
    kept: list[Any] = []
    for path, problems in by_key.items():
        deeper = any(other != path and other.startswith(f"{path}.") for other in by_key)
        if not deeper or all(problem["type"] == "value_error" for problem in problems):
            kept.append(problems[-1] if len(problems) == 1 else {**problems[0], "all": problems})
    return kept


def _describe(problem: Any, known: Sequence[str]) -> str:
    path = _path_of(problem, known)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else "see `pretrain schema` for the known keys"
        return f"unknown key `{path}` (value {value!r}); {hint}"
    if problem["type"] == "missing":
        return f"missing key `{path}`; add it (see `pretrain schema`)"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        options = re.findall(r"'([^']*)'", str(problem["ctx"].get("expected_tags", "")))
        given = str(problem["ctx"].get("tag", ""))
        near = difflib.get_close_matches(given, options, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        wanted = (
            f"expected one of {', '.join(options)}{hint} (value {given!r})" if given else "it says what is predicted"
        )
        return f"`{path}.kind`: {wanted}" if given else f"missing key `{path}.kind`; {wanted}"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        where = f"`{path}`: " if path else ""
        given = "" if isinstance(value, Mapping | BaseModel) or not path else f" (value {value!r})"
        return f"{where}{message}{given}"
    expected = " or ".join(dict.fromkeys(_expectation(part) for part in problem.get("all", [problem])))
    return f"`{path}`: {expected} (value {value!r})"


def _expectation(problem: Any) -> str:
    context = problem.get("ctx", {})
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "model_type": "a section with keys",
    }
    kind = problem["type"]
    if kind in wanted:
        return f"expected {wanted[kind]}"
    if kind == "literal_error":
        value = problem.get("input")
        options = re.findall(r"'([^']*)'", str(context["expected"]))
        near = difflib.get_close_matches(str(value), options, n=1)
        return f"expected one of {', '.join(options)}" + (f"; did you mean `{near[0]}`?" if near else "")
    if kind == "too_short":
        return f"expected at least {context['min_length']} item"
    if kind == "string_pattern_mismatch":
        return f"expected text that matches {context['pattern']}"
    return str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
