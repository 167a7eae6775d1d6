"""Objects by import path: how a configuration names a person's own functions.

What lives here: `my_module:my_function` to the object. What must not: torch, or what the object is for.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def import_path(path: str) -> Any:
    """The object that `my_module:my_function` names; modules in the working directory are found.

    They are looked for last, so that a file there never stands in for an installed module that is imported later.

    Raises:
        ValueError: when there is no such module or name, or it is Python's own: `os:system` is nobody's objective.
    """
    module_name, _, name = path.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"`{path}`: {module_name!r} is a module of Python; name a function of your own")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`{path}`: no module {error.name!r}; is it in the working directory, or installed?"
        ) from error
    except ImportError as error:
        raise ValueError(f"`{path}`: {error}; mend the imports of {module_name!r}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"`{path}`: the module {module_name!r} has no {name!r}") from None
