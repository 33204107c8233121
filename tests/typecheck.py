"""The type checker of the tests: beartype, without functions that are defined inside others.

Those are decorated anew at every call of the outer function, at 2 ms each: ten times the cost of
what many of them do.
"""

from beartype import beartype


def check(function):
    """Return a function that checks its arguments and its result."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
