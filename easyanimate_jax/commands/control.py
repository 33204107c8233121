"""Write the control videos of a folder of clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.training.safety.exits import DONE

HELP = """Write the control videos of a folder of clips to FOLDER/control_OPERATOR, and enter them
in its metadata.json as `control_file_path`. Existing control files are kept."""


@dataclass(frozen=True)
class Options:
    """The arguments of `control`."""

    folder: Positional[Path]
    """Folder with clips and a metadata.json."""
    operator: Positional[str]
    """canny, soft_edge, scribble, lines or line_art."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `control`; return the exit code."""
    return parse.run(partial(_control, arguments))


def _control(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "control", HELP)
    from easyanimate_jax.data.control import OPERATORS, write_controls

    if own.operator not in OPERATORS:
        raise ValueError(f"there is no operator {own.operator!r}; use {', '.join(OPERATORS)}")
    print(f"{write_controls(own.folder, own.operator)} control files written")
    return DONE
