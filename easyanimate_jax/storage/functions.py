"""Functions that users name as MODULE:FUNCTION, such as rewards and features."""

import importlib
import os
import sys
from collections.abc import Callable


def named_function(text: str) -> Callable:
    """Return the function MODULE:FUNCTION. Raises ValueError if there is none."""
    module, sign, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name) if sign and module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{text}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise ValueError(f"{text} is not MODULE:FUNCTION")
    return function
