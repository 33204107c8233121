"""Checkpoints: an orbax manager with three items a step: `state`, `ema` and `meta`.

`ema` is an item of its own because sampling reads only that. `meta` is JSON: the position in the
schedule, the plan it belongs to, and the whole config, from which `runs.load_run` rebuilds
everything. A step directory appears under its name only when it is complete (orbax renames it).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from easyanimate_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one run; saving is asynchronous, `close` waits for it."""

    def __init__(self, folder: Path, *, keep: int, keep_steps: Sequence[int] = ()):
        policy = preservation_policy.AnyPreservationPolicy(
            [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(list(keep_steps))]
        )
        self.folder = Path(folder).absolute()
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy),
            item_names=("state", "ema", "meta"),
        )

    def save(self, step: int, state: TrainState, meta: dict) -> None:
        """Start writing `state` as checkpoint `step`; does nothing if that step exists."""
        if step in self.manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(named_leaves(state._replace(ema=None))),
            ema=ocp.args.PyTreeSave(named_leaves(state.ema)),
            meta=ocp.args.JsonSave(meta),
        )
        self.manager.save(step, args=items)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self.manager.latest_step()

    def meta(self, step: int) -> dict:
        """The position and config stored with a step."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, straight onto the shardings of the abstract state `like`."""
        rest = like._replace(ema=None)
        items = self.manager.restore(
            step,
            args=ocp.args.Composite(state=_restore_like(rest), ema=_restore_like(like.ema)),
        )
        return _rebuild(rest, items["state"])._replace(ema=_rebuild(like.ema, items["ema"]))

    def close(self) -> None:
        """Wait for the writes under way, and raise what went wrong in them."""
        self.manager.wait_until_finished()
        self.manager.close()


def read_meta(folder: str | Path, step: int | None = None) -> tuple[int, dict]:
    """(step, meta) of a run folder's newest or named checkpoint, without touching a device.

    Raises ValueError if there is none.
    """
    root = Path(folder) / "checkpoints"
    steps = sorted(int(p.name) for p in root.glob("*") if p.name.isdigit())
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"checkpoint {step}"
        raise ValueError(f"{folder} holds no {wanted}; complete ones in {root}: {steps or 'none'}")
    step = steps[-1] if step is None else step
    meta = root / str(step) / "meta" / "metadata"
    if not meta.is_file():
        raise ValueError(f"{root / str(step)} is no checkpoint of ours: {meta} is missing")
    return step, json.loads(meta.read_text())


def restore_ema(folder: str | Path, step: int, like):
    """The averaged weights of one step, shaped and placed like the abstract module `like`."""
    path = (Path(folder) / "checkpoints" / str(step) / "ema").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        named = named_leaves(like)
        args = ocp.checkpoint_utils.construct_restore_args(named)
        return _rebuild(like, checkpointer.restore(path, item=named, restore_args=args))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed save left behind."""
    for path in Path(folder).glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def named_leaves(tree) -> dict[str, jax.Array]:
    """A flat dict of a tree's arrays, keys like `model.blocks.norm1.linear.kernel`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(_key(k) for k in path): leaf for path, leaf in paths}


def _key(key) -> str:
    return str(next(getattr(key, a) for a in ("name", "key", "idx") if hasattr(key, a)))


def _restore_like(tree):
    named = named_leaves(tree)
    return ocp.args.PyTreeRestore(
        named, restore_args=ocp.checkpoint_utils.construct_restore_args(named)
    )


def _rebuild(like, named: dict[str, jax.Array]):
    expected = named_leaves(like)
    wrong = [
        f"{k}: {getattr(named.get(k), 'shape', 'missing')} for {v.shape}"
        for k, v in expected.items()
        if getattr(named.get(k), "shape", None) != v.shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(wrong)}")
    return jax.tree.unflatten(jax.tree.structure(like), [named[k] for k in expected])
