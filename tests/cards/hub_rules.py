"""What the Hub is documented to check of a card: its metadata, as its own service of that name answers.

Source: hub-docs, modelcard.md (`model-index`, `datasets` and `license` are checked when a README is pushed),
model-cards.md, repositories-licenses.md, and eval-results.md of the evaluation files; the client's docstrings.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from pretrain.cards.metadata import LICENSES

# The server's own expression for the block, as the client quotes it.
BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")


def problems(card: str) -> list[str]:
    """What is wrong with a card; nothing of a good one."""
    block = BLOCK.search(card)
    if block is None:
        return ["no metadata block"]
    data = yaml.safe_load(block[2])
    if not isinstance(data, dict):
        return ["the metadata are no object"]
    return [*_names(data), *_index(data.get("model-index"))]


def _names(data: dict[str, Any]) -> Iterator[str]:
    for key in ("license", "library_name", "pipeline_tag", "license_name"):
        if key in data and not isinstance(data[key], str):
            yield f'"{key}" must be a string'
    if "license" in data and data["license"] not in LICENSES:
        yield '"license" must be one of the identifiers of the Hub'
    if data.get("license") == "other" and not data.get("license_name"):
        yield '"license_name" must say which license is other'
    for key, pattern in (("language", LANGUAGE), ("datasets", REPOSITORY), ("base_model", REPOSITORY)):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(
            isinstance(value, str) and pattern.fullmatch(value) for value in values
        ):
            yield f'"{key}" must be names of their kind: {values!r}'
    for key in ("tags", "metrics"):
        if not all(isinstance(value, str) for value in data.get(key, [])):
            yield f'"{key}" must be strings'


def _index(index: Any) -> Iterator[str]:
    if index is None:
        return
    if not isinstance(index, list) or len(index) != 1 or not isinstance(index[0].get("name"), str):
        yield '"model-index" must be one entry with a name'
        return
    results = index[0].get("results")
    if not isinstance(results, list) or not results:
        yield '"model-index[0].results" must be a list'
        return
    for number, result in enumerate(results):
        for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
            for key in keys:
                if not isinstance(result.get(part, {}).get(key), str) or not result[part][key]:
                    yield f'"model-index[0].results[{number}].{part}.{key}" is required'
        for metric in result.get("metrics") or [{}]:
            if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                yield f'"model-index[0].results[{number}].metrics" need type and value'


class Service:
    """The service at `/api/validate-yaml`, on this machine: 400 with what is wrong, in text."""

    def __init__(self) -> None:
        service = self
        self.asked: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.asked.append(asked | {"path": self.path})
                found = problems(asked["content"])
                said = "\n".join(found).encode()
                self.send_response(400 if found else 200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
