"""Encode captioned files to records: `python -m easyanimate_jax prepare CONFIG`.

Each clip is cropped to a shape of its set's budget and encoded once, to mean and log-variance.
Training reads these tokens and draws new samples. All captions are kept, and several I2V masks with
noised references (spec 6.1) are drawn per clip. A set with `pixels` has only its texts encoded here
(see runs/visits.py).

    OUT/SET/                  the records of one latent set, see data/records.py
    OUT/texts/                the text states of all captions, see prepare/texts.py
    OUT/empty.safetensors     text states of the empty prompt
    OUT/prompts.safetensors   text states of the config's sample prompts
    OUT/quarantine.jsonl      rows and clips that were left out, with the reason
    OUT/cut.jsonl             captions that are too long for a text encoder
    OUT/contents.jsonl        hashes of the files of the source, see data/contents.py

The work has two steps. `plan_sets` reads the source and writes manifests (prepare/manifest.py):
which entries are missing, and which shard makes each. `make_sets` makes shards, on any number of
processes and machines at once; a shard is created whole, by the first that has it. The last process
to finish writes the index. The same command again makes what is missing, or was made from other
content.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from easyanimate_jax.data.contents import kept_contents, key
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.data.shards import Shards, key_array
from easyanimate_jax.data.sources.read import read_chunks
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.device import Device
from easyanimate_jax.prepare.jobs import Selection
from easyanimate_jax.prepare.manifest import Manifest
from easyanimate_jax.prepare.plans import SetPlan, TextPlan
from easyanimate_jax.prepare.quarantine import LeftOut, Quarantine, file_of, line_of
from easyanimate_jax.prepare.reader import Threads
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.prepare.texts import TextMaker
from easyanimate_jax.storage.lock import part_lock
from easyanimate_jax.storage.stores import Place, Remote, place
from easyanimate_jax.storage.whole import remove_left

logger = logging.getLogger(__name__)

SHOWN = 10  # clips that a message names

Source = str | Path | Remote | tuple


def prepare(
    source: Source,
    output: str | Path | Remote,
    sets: Sequence[LatentSet],
    vae: CausalVAE,
    text_encoder,
    prompts: Sequence[str],
    seed: int,
    *,
    weights: dict[str, str],
    shard_size: int = 0,
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Encode the clips of `source` for every set; return whether all sets are complete.

    `source` may be a pair: the source, and a folder that its links may lead into. A record's
    entries are kept if its film, its control and its captions have the content that they were made
    from. `shard_size` are records of a shard; 0 chooses by bytes.

    `part` (k, n) makes every n-th shard from the k-th on, so n processes on any hosts can share the
    work. The last process to finish writes the index. `plan_sets` and `make_sets` are its steps.

    `text_encoder.encode(prompts)` returns one array of states per encoder. `weights` are the
    fingerprints of the folders of VAE and text encoders. Raises ValueError if another process makes
    this part, and if more than `MAX_BAD` of the clips of a set or part are unreadable.
    """
    plan_sets(source, output, sets, seed, weights=weights, shard_size=shard_size, part=part)
    models = vae, text_encoder, prompts
    return make_sets(output, sets, *models, seed, weights=weights, part=part)


def plan_sets(
    source: Source,
    output: str | Path | Remote,
    sets: Sequence[LatentSet],
    seed: int,
    *,
    weights: dict[str, str],
    shard_size: int = 0,
    part: tuple[int, int] = (0, 1),
) -> None:
    """Read the source and write the manifests of all sets; no model and no device is needed."""
    output, lines = place(output), []
    with part_lock(output, "--prepared", part) as lock:
        makers = [SetMaker(output / s.name, s, {"weights": weights, "seed": seed}) for s in sets]
        plans = [SetPlan(maker, Selection(maker.latent_set, seed)) for maker in makers]
        texts = TextPlan(TextMaker(output / "texts", None, weights.get("text")))
        contents = kept_contents(output)
        for clips, problems in read_chunks(*source if isinstance(source, tuple) else (source,)):
            lines += [line_of(problem._asdict()) for problem in problems]
            for one in plans:
                texts.add(one.add(clips, contents, texts.maker.key))
        for one in plans:
            one.selection.close()
        lock.begun = True  # all settings are accepted
        texts.write(shard_size, lines)
        for one in plans:
            one.write(shard_size)
        quarantine = Quarantine(output / "quarantine.jsonl")
        for line in lines if part[0] == 0 else ():
            quarantine.add(line)


def make_sets(
    output: str | Path | Remote,
    sets: Sequence[LatentSet],
    vae: CausalVAE,
    text_encoder,
    prompts: Sequence[str],
    seed: int,
    *,
    weights: dict[str, str],
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Make this part of the shards of the latest manifests; return whether all sets are complete.

    Only the manifests are read, not the source's tables. The arguments are those of `prepare`.
    """
    with opened(output, sets, seed, weights, part) as work, Threads() as decode:
        texts = TextMaker(work.output / "texts", text_encoder, weights.get("text"))
        device = Device(vae, texts, seed, decode)
        cut = device.prompts(work.output, prompts, prompts_key(prompts, weights))
        mine = work.missing_texts()
        for shard in tqdm(mine, desc="captions", unit="shard", disable=not mine):
            device.texts(work.told, shard)
        for maker, manifest in zip(work.makers, work.manifests, strict=True):
            clips = work.missing(maker, manifest)
            total = sum(clips.values())
            with tqdm(total=total, desc=maker.latent_set.name, unit="clip") as progress:
                left_out = work.left_out(maker, total)
                device.pixels(maker, manifest, clips, left_out, progress.update)
        return work.finish(prompts, cut, bool(mine))


@contextmanager
def opened(
    output: str | Path | Remote,
    sets: Sequence[LatentSet],
    seed: int,
    weights: dict[str, str],
    part: tuple[int, int],
) -> Iterator["Work"]:
    """Hold the lock of a part of the work, and give the work."""
    output = place(output)
    with part_lock(output, "--prepared", part) as lock:
        makers = [SetMaker(output / s.name, s, {"weights": weights, "seed": seed}) for s in sets]
        work = Work(output, makers, TextMaker(output / "texts", None, weights.get("text")), part)
        lock.begun = True
        yield work


class Work:
    """A part of the shards of all manifests: which are missing, and the indices of the whole."""

    def __init__(self, output: Place, makers: Sequence[SetMaker], texts: TextMaker, part):
        self.output, self.makers, self.maker_of_texts, self.part = output, makers, texts, part
        self.quarantine = Quarantine(output / "quarantine.jsonl")
        self.told = texts.open()
        self.manifests = [maker.open() for maker in makers]

    def missing_texts(self) -> dict[int, int]:
        """Return the shards of texts to make, and how many captions each has."""
        return self._missing(self.told, self.maker_of_texts.folder)

    def missing(self, maker: SetMaker, manifest: Manifest) -> dict[int, int]:
        """Return the shards of a set to make, and how many clips each has."""
        return self._missing(manifest, maker.folder)

    def left_out(self, maker: SetMaker, clips: int) -> LeftOut:
        """Return what takes the lines of the unreadable ones of so many clips of a set."""
        return LeftOut(maker.latent_set.name, clips, self.quarantine.path, self.quarantine.add)

    def finish(self, prompts: Sequence[str], cut: Sequence[str], told: bool) -> bool:
        """Write the indices if all shards exist, and tidy up; return whether all exist.

        `cut` are the sample prompts that are too long. A warning names the texts that are, if
        `told`.
        """
        if not self.maker_of_texts.is_whole(self.told):
            return False
        lines = [m.finish(one) for m, one in zip(self.makers, self.manifests, strict=True)]
        if None in lines:
            return False
        lines = [*self.told.about["problems"], *itertools.chain.from_iterable(lines)]
        again = self._among(self.quarantine.files())
        self.quarantine.forget({*again, *map(file_of, lines)}, but=lines)
        for maker in (self.maker_of_texts, *self.makers):
            if isinstance(maker.folder, Path):
                for folder in maker.folder.glob("shards/*/"):
                    remove_left(folder)
        self._note_cut(prompts, cut, told)
        return True

    def _missing(self, manifest: Manifest, folder: Place) -> dict[int, int]:
        """Return this part's shards that do not exist, and how many rows each has."""
        have = Shards(folder / "shards").sizes
        mine = range(self.part[0], len(manifest.shards), self.part[1])
        shards = manifest.columns(["shard"])["shard"].to_numpy()
        rows = np.bincount(shards[shards >= 0], minlength=len(manifest.shards)).tolist()
        return {shard: rows[shard] for shard in mine if manifest.shards[shard] not in have}

    def _among(self, files: set[str | None]) -> set[str]:
        """Return those of the files that are clips of a set; memory does not grow with the sets."""
        chunks = itertools.chain.from_iterable(one.chunks(["clip"]) for one in self.manifests)
        return set().union(*(files.intersection(table["clip"].to_pylist()) for table in chunks))

    def _note_cut(self, prompts: Sequence[str], cut_prompts: Sequence[str], told: bool) -> None:
        """Write the captions whose end no encoder reads; say so if `told`."""
        cut = np.array(sorted(self.maker_of_texts.cut()), "S16")
        count, pairs = 0, {("sample prompt", p): None for p in cut_prompts}
        names = ["clip", "captions", "texts"]
        for table in itertools.chain.from_iterable(one.chunks(names) for one in self.manifests):
            lists, captions = table["texts"].combine_chunks(), table["captions"].combine_chunks()
            keys = key_array(lists.flatten())
            row = np.repeat(np.arange(len(table)), np.diff(lists.offsets.to_numpy()))
            count += len(keys)
            at = np.flatnonzero(np.isin(keys, cut))
            words, clips = captions.flatten().take(at), table["clip"].take(row[at])
            pairs |= dict.fromkeys(zip(clips.to_pylist(), words.to_pylist(), strict=True))
        file = Quarantine(self.output / "cut.jsonl")
        lines = [line_of({"file": clip, "caption": text}) for clip, text in pairs]
        file.forget(self._among(file.files()) | {"sample prompt"}, but=lines)
        if pairs and told:
            some = ", ".join(list(dict.fromkeys(clip for clip, _ in pairs))[:SHOWN])
            logger.warning(
                f"{len(pairs):,} of {count + len(prompts):,} captions are too long for a text "
                f"encoder, which does not read their end: {some}{', ...' * (len(pairs) > SHOWN)}. "
                f"{file.path} holds all of them; shorten them, or go on"
            )


def prompts_key(prompts: Sequence[str], weights: dict[str, str]) -> str:
    """Return the key of the text states of sample prompts."""
    return key(list(prompts), weights.get("text"))
