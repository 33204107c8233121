"""Objects that users name as MODULE:NAME: rewards, features and scores."""

import importlib
import os
import sys
from collections.abc import Callable


def named_object(text: str) -> object:
    """Return the object MODULE:NAME; None if the text has another form.

    MODULE is looked for in the current folder, too. Raises ValueError if there is no such object.
    """
    module, sign, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name) if sign and module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{text}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())


def named_function(text: str) -> Callable:
    """Return the function MODULE:FUNCTION. Raises ValueError if there is none."""
    function = named_object(text)
    if not callable(function):
        raise ValueError(f"{text} is not MODULE:FUNCTION")
    return function
