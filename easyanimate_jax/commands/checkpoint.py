"""List, verify and compare the checkpoints of a run, without a device."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from easyanimate_jax.training.checkpoint import ITEMS, damage
from easyanimate_jax.weights.run_folder import complete_steps, is_verified, read_step_meta


def main(arguments: Sequence[str]) -> int:
    """The command; 0 if all is well, 1 if something is damaged or differs, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m easyanimate_jax checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "the steps of a run and what is known of them"),
        ("verify", "read every array of every step and compare it with what was saved"),
        ("diff", "the arrays in which two steps differ"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, help="a run, or its checkpoints")
        if name == "diff":
            command.add_argument("first", type=int)
            command.add_argument("second", type=int)
    a = parser.parse_args(arguments)
    folder = a.folder / "checkpoints" if (a.folder / "checkpoints").is_dir() else a.folder
    try:
        if not complete_steps(folder):
            raise ValueError(f"{a.folder} holds no checkpoints")
        if a.command == "diff":
            return _diff(folder, a.first, a.second)
        return {"list": _list, "verify": _verify}[a.command](folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _list(folder: Path) -> int:
    for step in complete_steps(folder):
        path = folder / str(step)
        try:
            meta = read_step_meta(path)
            known = "verified" if is_verified(path) else "not verified yet"
            known = known if "arrays" in meta else "without fingerprints"
            print(f"{step:>8}  {meta.get('stage', '')}  {known}")
        except ValueError as error:
            print(f"{step:>8}  {error}")
    for path in sorted(folder.glob("*.corrupt*")):
        print(f"{path.name:>8}  {(path / 'reason').read_text().strip()}")
    return 0


def _verify(folder: Path) -> int:
    bad = 0
    for step in complete_steps(folder):
        wrong = damage(folder / str(step))
        bad += bool(wrong)
        print(f"{step:>8}  {'; '.join(wrong) or 'as saved'}", flush=True)
    return 1 if bad else 0


def _diff(folder: Path, first: int, second: int) -> int:
    metas = [read_step_meta(folder / str(step)) for step in (first, second)]
    if not all("arrays" in meta for meta in metas):
        raise ValueError(f"checkpoint {first} or {second} is from before fingerprints")
    one, two = (
        {f"{item}.{n}": array for item in ITEMS for n, array in meta["arrays"][item].items()}
        for meta in metas
    )
    differ = [name for name in one | two if one.get(name) != two.get(name)]
    for name in differ:
        print(f"{name}  {one.get(name, '-')}  {two.get(name, '-')}")
    print(f"{len(differ)} of {len(one | two)} arrays differ between {first} and {second}")
    return 1 if differ else 0
