#!/usr/bin/env python
"""A Hub on this machine, to rehearse `pretrain publish` before anything leaves it.

    python scripts/local_hub.py 8765 hub        # port (0: a free one), folder that holds the repositories

It prints the lines that make a shell use it, then answers until Ctrl-C. Only this machine can reach it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.local_hub import WRITER, LocalHub


def main() -> None:
    """Serve until somebody interrupts."""
    parser = argparse.ArgumentParser(description="A Hub on this machine.")
    parser.add_argument("port", type=int, help="0 for a free one")
    parser.add_argument("folder", type=Path, help="holds the repositories")
    given = parser.parse_args()
    hub = LocalHub(given.folder, given.port).start()
    lines = (
        f"export HF_ENDPOINT={hub.url}",
        f"export HF_TOKEN={WRITER}",
        "export HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0",
    )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    try:
        hub.wait()
    except KeyboardInterrupt:
        hub.close()


if __name__ == "__main__":
    main()
