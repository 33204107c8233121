"""Write a folder's control videos: `python -m easyanimate_jax control FOLDER OPERATOR`."""

import sys

from easyanimate_jax.data.control import OPERATORS, write_controls


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[1] not in OPERATORS:
        print(f"{__doc__}\noperators: {', '.join(OPERATORS)}", file=sys.stderr)
        return 2
    try:
        print(f"{write_controls(*arguments)} control files written")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
