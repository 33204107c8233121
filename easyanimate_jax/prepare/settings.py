"""What the results of a function depend on, so that they are made again when it changes."""

import dataclasses
import inspect
from pathlib import Path


def told(maker: object) -> object:
    """Return what the results of a function or a model depend on, as JSON values.

    For a function of this package, this is its source; for another one, the source of its module.
    """
    if dataclasses.is_dataclass(maker):
        fields = [f.name for f in dataclasses.fields(maker) if f.compare]
        return [type(maker).__qualname__, {f: repr(getattr(maker, f)) for f in fields}]
    made_by = maker if hasattr(maker, "__qualname__") else type(maker)
    try:
        if made_by.__module__.startswith(f"{__package__.partition('.')[0]}."):
            return inspect.getsource(made_by)
        return [made_by.__qualname__, Path(inspect.getsourcefile(made_by)).read_text("utf-8")]
    except (OSError, TypeError):  # typed at a prompt, or not written in Python
        return made_by.__qualname__
