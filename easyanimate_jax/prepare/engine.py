"""Make the shards of prepared sets on a Ray cluster: `prepare --engine ray`.

Each host with devices has one process with the models, which makes two shards at a time. It decodes
their clips by tasks on any CPUs of the cluster, a few groups of clips ahead. The driver plans,
passes shards to these processes, and writes the index. What exists is found by listing it, so a
driver that was killed is started again by the same command. The files are those of `make_sets`
without an engine, to the byte.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from easyanimate_jax.data.paths import beside
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare import cluster
from easyanimate_jax.prepare.clips import Job
from easyanimate_jax.prepare.cluster import DEEP, Failure, Hosts, Kind, Task, Unusable, check_seen
from easyanimate_jax.prepare.device import Device
from easyanimate_jax.prepare.manifest import Manifest
from easyanimate_jax.prepare.prepare import Work, opened, prompts_key
from easyanimate_jax.prepare.quarantine import LeftOut, TooManyUnreadable
from easyanimate_jax.prepare.reader import Decoded, decode
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.prepare.texts import TextMaker
from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.storage.stores import Place, Remote, place

logger = logging.getLogger(__name__)

PIXELS = 2**22  # decoded by a task, unless one clip has more

Load = Callable[[], tuple[CausalVAE, object]]  # the models, in a process on a host


def make_sets(
    output: str | Path | Remote,
    sets: Sequence[LatentSet],
    load: Load,
    prompts: Sequence[str],
    seed: int,
    *,
    weights: dict[str, str],
    devices: Kind = "any",
) -> bool:
    """Make all shards of the latest manifests on the cluster; return whether all sets are complete.

    `load` returns the VAE and the text encoder; it is called on each host with devices. Shards that
    could not be made are logged, and the others are made. Raises ValueError if Ray is not
    installed, if a host does not see the source or the output, if too many clips of a set are
    unreadable, and if the models cannot be loaded.
    """
    cluster.check_ray()
    output = place(output).absolute()
    with opened(output, sets, seed, weights, (0, 1)) as work, cluster.connected():
        tasks = _tasks(work, prompts, weights)
        try:
            cut = _made(work, _hosts(work, load, seed, devices), tasks)
        except TooManyUnreadable as error:
            for line in error.lines:
                work.quarantine.add(line)
            raise
        told = any(task.method == "texts" for task in tasks)
        return cut is not None and work.finish(prompts, cut, told)


def _made(work: Work, hosts: Hosts, tasks: Sequence[Task]) -> list[str] | None:
    """Make all tasks; return the sample prompts that are cut, or None if a task has failed."""
    left_out, cut, failed = {}, [], 0
    with tqdm(total=sum(task.rows for task in tasks), desc="rows", unit="row") as progress:
        for task, result in hosts.run(tasks, (TooManyUnreadable, Unusable)):
            if isinstance(result, Failure):
                failed += 1
                logger.error(f"{task.name} is not made: {result.reason}")
                continue
            progress.update(task.rows)
            if task.method == "prompts":
                cut = result
            elif task.method == "pixels":
                number, _, _, clips = task.arguments
                if number not in left_out:
                    left_out[number] = work.left_out(work.makers[number], clips)
                for line in result:
                    left_out[number](line)
    return None if failed else cut


class Maker:
    """The process with the devices of a host. Its `Device` decodes on the CPUs of the cluster."""

    def __init__(
        self,
        load: Load,
        makers: Sequence[SetMaker],
        texts: TextMaker,
        seed: int,
        workers: int,
        seen: tuple[Place, ...],
    ):
        self.load, self.makers, self.maker_of_texts = load, makers, texts
        self.seed, self.workers, self.seen = seed, workers, seen

    def start(self) -> None:
        """Load the models. Raises `Unusable` if this host does not see the folders."""
        check_seen(self.seen)
        self.mesh = make_mesh(MeshConfig())
        with jax.set_mesh(self.mesh):
            vae, encoder = self.load()
        texts = TextMaker(self.maker_of_texts.folder, encoder, self.maker_of_texts.weights)
        self.device = Device(vae, texts, self.seed, OnCluster(self.seen), self.workers)

    def prompts(self, output: Place, prompts: Sequence[str], about: str) -> list[str]:
        """Return the prompts that are cut, as `Device.prompts` does."""
        with jax.set_mesh(self.mesh):
            return self.device.prompts(output, prompts, about)

    def texts(self, file: Place, shard: int) -> None:
        """Make a shard of the texts of a manifest."""
        with jax.set_mesh(self.mesh):
            self.device.texts(Manifest(file), shard)

    def pixels(self, number: int, file: Place, shard: int, clips: int) -> list[str]:
        """Make a shard of a set with so many clips to make; return the lines of unreadable ones."""
        maker, lines = self.makers[number], []
        path = self.maker_of_texts.folder.parent / "quarantine.jsonl"
        left_out = LeftOut(maker.latent_set.name, clips, path, lines.append)
        try:
            self.device.pixels(maker, Manifest(file), [shard], left_out, lambda count: None)
        except TooManyUnreadable as error:
            error.lines = lines
            raise
        return lines


class OnCluster:
    """A `Decode` with tasks on the CPUs of the cluster."""

    def __init__(self, seen: tuple[Place, ...]):
        self.task, self.seen = cluster.on_cpus(decode_jobs), seen

    def __call__(self, latent_set: LatentSet, seed: int, jobs: Sequence[Job]):
        import ray

        frames, height, width = jobs[0].shape
        step = max(1, PIXELS // (frames * height * width))
        parts = [jobs[first : first + step] for first in range(0, len(jobs), step)]
        refs = [self.task.remote(latent_set, seed, part, self.seen) for part in parts]
        return lambda: [clip for part in ray.get(refs) for clip in part]


def decode_jobs(
    latent_set: LatentSet, seed: int, jobs: Sequence[Job], seen: tuple[Place, ...]
) -> list[Decoded]:
    """Return what `decode` returns for each job. Raises `Unusable` as `check_seen` does."""
    check_seen(seen)
    return [decode(latent_set, seed, job) for job in jobs]


def _hosts(work: Work, load: Load, seed: int, devices: Kind) -> Hosts:
    roots = {
        beside(maker.folder, manifest.about["root"])
        for maker, manifest in zip(work.makers, work.manifests, strict=True)
        if manifest.about["root"]
    }
    seen = tuple(path for path in (work.told.file, *roots) if isinstance(path, Path))
    kind = cluster.chosen(devices)
    workers = max(1, cluster.cpus_a_host(kind) // DEEP)
    return Hosts(Maker, (load, work.makers, work.maker_of_texts, seed, workers, seen), kind)


def _tasks(work: Work, prompts: Sequence[str], weights: dict[str, str]) -> list[Task]:
    """Return a task for the prompts, and one for each shard that does not exist."""
    about = work.output, prompts, prompts_key(prompts, weights)
    tasks = [Task("the sample prompts", "prompts", about, 0)]
    for shard, rows in work.missing_texts().items():
        name = f"{work.maker_of_texts.folder / 'shards' / work.told.shards[shard]}"
        tasks.append(Task(name, "texts", (work.told.file, shard), rows))
    for number, (maker, manifest) in enumerate(zip(work.makers, work.manifests, strict=True)):
        missing = work.missing(maker, manifest)
        for shard, rows in missing.items():
            name = f"{maker.folder / 'shards' / manifest.shards[shard]}"
            arguments = number, manifest.file, shard, sum(missing.values())
            tasks.append(Task(name, "pixels", arguments, rows))
    return tasks
