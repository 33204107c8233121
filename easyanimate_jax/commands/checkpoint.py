"""List, verify and compare the checkpoints of a run, without a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from tyro.conf import Positional

from easyanimate_jax.commands import parse
from easyanimate_jax.storage.stores import Place
from easyanimate_jax.training.safety.exits import DONE, FOUND
from easyanimate_jax.weights.steps import Steps, steps_in

HELP = """List, verify and compare the checkpoints of a run, without an accelerator.

  list FOLDER                print the steps of a run, and whether each is verified
  verify FOLDER              read every array of every step and compare it with its fingerprint
  diff FOLDER FIRST SECOND   print the arrays that differ between two steps

Exit codes: 0, all is well; 1, something is damaged or differs; 2, wrong arguments."""


@dataclass(frozen=True)
class Options:
    """The arguments of `checkpoint`."""

    action: Positional[Literal["list", "verify", "diff"]]
    """Action on the checkpoints."""
    folder: Positional[Place]
    """Run folder, or its folder `checkpoints`."""
    steps: Positional[tuple[int, ...]] = ()
    """Two steps; only for `diff`."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb `checkpoint`; return the exit code."""
    return parse.run(partial(_checkpoint, arguments))


def _checkpoint(arguments: Sequence[str]) -> int:
    own = parse.options(Options, arguments, "checkpoint", HELP)
    if len(own.steps) != (2 if own.action == "diff" else 0):
        raise ValueError(f"{own.action} with steps {own.steps}: give two for diff, else none")

    inner = own.folder / "checkpoints"
    steps = steps_in(inner if inner.is_dir() else own.folder)
    if not steps.complete():
        raise ValueError(f"{own.folder} holds no checkpoints; give the folder of a run")
    return {"list": _list, "verify": _verify, "diff": _diff}[own.action](steps, *own.steps)


def _list(steps: Steps) -> int:
    for step in steps.complete():
        try:
            meta = steps.meta(step)
            known = "verified" if steps.is_verified(step) else "not verified yet"
            known = known if "arrays" in meta else "without fingerprints"
            print(f"{step:>8}  {meta.get('stage', '')}  {known}")
        except ValueError as error:
            print(f"{step:>8}  {error}")
    for name, reason in steps.damaged().items():
        print(f"{name:>8}  {reason}")
    return DONE


def _verify(steps: Steps) -> int:
    from easyanimate_jax.training.checkpoint import damage

    bad = 0
    for step in steps.complete():
        wrong = damage(steps.folder / str(step))
        bad += bool(wrong)
        print(f"{step:>8}  {'; '.join(wrong) or 'as saved'}", flush=True)
    return FOUND if bad else DONE


def _diff(steps: Steps, first: int, second: int) -> int:
    metas = [steps.meta(step) for step in (first, second)]
    if not all("arrays" in meta for meta in metas):
        raise ValueError(f"checkpoint {first} or {second} has no fingerprints; choose newer steps")
    one, two = (
        {
            f"{item}.{n}": array
            for item, named in meta["arrays"].items()
            for n, array in named.items()
        }
        for meta in metas
    )
    differ = [name for name in one | two if one.get(name) != two.get(name)]
    for name in differ:
        print(f"{name}  {one.get(name, '-')}  {two.get(name, '-')}")
    print(f"{len(differ)} of {len(one | two)} arrays differ between {first} and {second}")
    return FOUND if differ else DONE
