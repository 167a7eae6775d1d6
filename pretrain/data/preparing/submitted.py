"""Work that was handed to a cluster and is not done yet.

What lives here: how that is told. What must not: an import; the command line reads this before any library.
"""

from __future__ import annotations


class SubmittedError(Exception):
    """Nothing is wrong, but there is no result yet; says what was submitted, and how to collect it."""
