"""The process that sends what a running training has put aside: `python -m pretrain.publishing.pushing SPOOL`.

What lives here: one pass over the spool at the lowest priority, a line of output for whoever started it. What must not:
torch, or anything of the training.

It ends with 0 when nothing is left, and with 1 when something could not be sent; its last line says why.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.files import ArtifactError, lock_directory
from pretrain.publishing.background import ON_THE_WAY, TARGET, Waiting, waiting_in
from pretrain.publishing.contents import look_into
from pretrain.publishing.hub import TIMEOUT_SECONDS, Hub, PublishError, check_repository_name
from pretrain.publishing.leaks import without_secrets
from pretrain.publishing.record import Origin
from pretrain.publishing.releases import Release, send_release

_LOWEST = 19


def push(spool: Path) -> int:
    """Send what waits, oldest first; return the exit code."""
    target: Any = json.loads((spool / TARGET).read_text(encoding="utf-8"))
    name = check_repository_name(target["to"])
    hub = Hub(lambda line: _say(f"{ON_THE_WAY}{line}"), timeout=target["timeout"] or TIMEOUT_SECONDS)
    given_up: set[int] = set()
    while waiting := [one for one in waiting_in(spool) if one.step not in given_up]:
        try:
            _say(_sent(hub, waiting[0], name, private=bool(target["private"])))
        except (PublishError, ConnectionError) as error:
            _say(f"step {waiting[0].step:,} is not on {name} yet: {error}")
            return 1
        except (ArtifactError, OSError) as error:
            if waiting[0].mark.exists():  # or it was given up for a newer one meanwhile
                _say(f"step {waiting[0].step:,} cannot be sent: {error}")
            given_up.add(waiting[0].step)
    return 1 if given_up else 0


def _sent(hub: Hub, waiting: Waiting, name: str, *, private: bool) -> str:
    contents = look_into(waiting.folder, waiting.digests)
    release = Release(f"step-{waiting.step}", contents, Origin(waiting.run_id, waiting.step, waiting.tokens))
    plan = send_release(hub, release, name=name, private=private)
    waiting.remove()
    size = sum(piece.size for piece in plan.to_send)
    return f"step {waiting.step:,} is on {name} (step-{waiting.step}): {len(plan.to_send)} files, {size:,} bytes"


def _say(line: str) -> None:
    sys.stdout.write(" ".join(without_secrets(line).split()) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Empty the spool that the command line names; another process that does so already is left to it."""
    with suppress(OSError):
        os.nice(_LOWEST)
    logging.disable(logging.WARNING)  # the library's own words on tries; the reason of the last one is told
    spool = Path(sys.argv[1])
    try:
        with lock_directory(spool):
            return push(spool)
    except (ValueError, OSError) as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
