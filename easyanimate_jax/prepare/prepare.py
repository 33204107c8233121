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

import hashlib
import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from easyanimate_jax.data.contents import kept_contents, key
from easyanimate_jax.data.records import LatentSet, write_texts
from easyanimate_jax.data.shards import Shards, key_array
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.clips import Job, Pixels, frames_of, make_job, read_pixels
from easyanimate_jax.prepare.encode import Encoder, encode_pixels
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.prepare.texts import TextMaker
from easyanimate_jax.storage.local import shown
from easyanimate_jax.storage.lock import part_lock
from easyanimate_jax.storage.stores import Place, Remote, place, replace_text

logger = logging.getLogger(__name__)

ROWS = 16  # clips encoded at once, at most
AHEAD = 2  # groups of clips that are decoded while another one is encoded
SHOWN = 10  # clips that a message names
MAX_BAD = 0.05  # share of a set's clips that may be unreadable

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
    output = place(output)
    with part_lock(output, "--prepared", part) as lock:
        clips, problems = read_clips(*source if isinstance(source, tuple) else (source,))
        makers = [SetMaker(output / s.name, s, {"weights": weights, "seed": seed}) for s in sets]
        jobs = [select(s, clips, seed) for s in sets]
        lock.begun = True  # all settings are accepted
        contents = kept_contents(output)
        lines = [_line(problem._asdict()) for problem in problems]
        texts = TextMaker(output / "texts", None, weights.get("text"))
        captions = {text for some in jobs for job in some for text in job.clip.captions}
        texts.plan(captions, shard_size, lines)
        for maker, some in zip(makers, jobs, strict=True):
            maker.plan(some, contents, texts.key, shard_size)
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
    output = place(output)
    with part_lock(output, "--prepared", part) as lock:
        makers = [SetMaker(output / s.name, s, {"weights": weights, "seed": seed}) for s in sets]
        texts = TextMaker(output / "texts", text_encoder, weights.get("text"))
        work = Work(output, makers, texts, part)
        lock.begun = True
        work.texts(prompts, prompts_key(prompts, weights))
        work.pixels(vae, seed)
        return work.finish(prompts)


class Work:
    """The work of one process: its part of the shards of all manifests."""

    def __init__(self, output: Place, makers: Sequence[SetMaker], texts: TextMaker, part):
        self.output, self.makers, self.maker_of_texts, self.part = output, makers, texts, part
        self.quarantine = Quarantine(output / "quarantine.jsonl")
        self.told = texts.open()
        self.manifests = [maker.open() for maker in makers]
        self.made = 0  # shards of texts

    def texts(self, prompts: Sequence[str], about: str) -> None:
        """Encode the empty prompt, the sample prompts, and this part's captions."""
        maker = self.maker_of_texts
        write_texts(self.output / "empty.safetensors", maker.batch([""]))
        if prompts:
            write_texts(self.output / "prompts.safetensors", maker.batch(prompts), about)
        mine = self._missing(self.told, maker.folder)
        for shard in tqdm(mine, desc="captions", unit="shard", disable=not mine):
            maker.make(self.told, shard)
        self.made = len(mine)

    def pixels(self, vae: CausalVAE | None, seed: int) -> None:
        """Encode the clips of this part."""
        encoder = None
        for maker, manifest in zip(self.makers, self.manifests, strict=True):
            mine = self._missing(manifest, maker.folder)
            rows = {shard: len(manifest.rows(shard)) for shard in mine}
            total = sum(rows.values())
            if encoder is None and not maker.latent_set.pixels:
                encoder = Encoder(vae, jax.local_devices(), most=ROWS, announce=logger.info)
            with tqdm(total=total, desc=maker.latent_set.name, unit="clip") as progress:
                read = Reader(maker.latent_set, total, encoder, self.quarantine, seed, progress)
                for shard in mine:
                    maker.make(manifest, shard, read)

    def finish(self, prompts: Sequence[str]) -> bool:
        """Write the indices if all shards exist; return whether they do."""
        if not self.maker_of_texts.is_whole(self.told):
            return False
        lines = [m.finish(one) for m, one in zip(self.makers, self.manifests, strict=True)]
        if None in lines:
            return False
        lines = [*self.told.about["problems"], *itertools.chain.from_iterable(lines)]
        names = itertools.chain.from_iterable(
            one.columns(["clip"])["clip"].to_pylist() for one in self.manifests
        )
        self.quarantine.forget({*names, *map(_file_of, lines)}, but=lines)
        self._note_cut(prompts)
        return True

    def _missing(self, manifest, folder: Place) -> list[int]:
        """Return this part's shards that do not exist."""
        have = Shards(folder / "shards").sizes
        mine = range(self.part[0], len(manifest.shards), self.part[1])
        return [shard for shard in mine if manifest.shards[shard] not in have]

    def _note_cut(self, prompts: Sequence[str]) -> None:
        """Write the captions whose end no encoder reads; say so if some were encoded now."""
        encoder, cut = self.maker_of_texts.text_encoder, self.maker_of_texts.cut()
        count, names = 0, set()
        pairs = {("sample prompt", p): None for p in prompts if encoder.is_cut(p)}
        for manifest in self.manifests:
            table = manifest.columns(["clip", "captions", "texts"])
            lists, captions = table["texts"].combine_chunks(), table["captions"].combine_chunks()
            keys = key_array(lists.flatten())
            row = np.repeat(np.arange(len(table)), np.diff(lists.offsets.to_numpy()))
            count += len(keys)
            names |= set(table["clip"].to_pylist())
            at = np.flatnonzero(np.isin(keys, np.array(sorted(cut), "S16")))
            words, clips = captions.flatten().take(at), table["clip"].take(row[at])
            pairs |= dict.fromkeys(zip(clips.to_pylist(), words.to_pylist(), strict=True))
        file = Quarantine(self.output / "cut.jsonl")
        lines = [_line({"file": clip, "caption": text}) for clip, text in pairs]
        file.forget(names | {"sample prompt"}, but=lines)
        if pairs and self.made:
            some = ", ".join(list(dict.fromkeys(clip for clip, _ in pairs))[:SHOWN])
            logger.warning(
                f"{len(pairs):,} of {count + len(prompts):,} captions are too long for a text "
                f"encoder, which does not read their end: {some}{', ...' * (len(pairs) > SHOWN)}. "
                f"{file.path} holds all of them; shorten them, or go on"
            )


def prompts_key(prompts: Sequence[str], weights: dict[str, str]) -> str:
    """Return the key of the text states of sample prompts."""
    return key(list(prompts), weights.get("text"))


def select(latent_set: LatentSet, clips: Sequence[Clip], seed: int) -> list[Job]:
    """Return the set's clips as jobs, sorted by shape; log how many are left out, and why.

    Raises ValueError if no clip fits.
    """
    jobs, left_out = [], Counter()
    for clip in clips:
        if clip.kind not in latent_set.kinds:
            left_out[f"of kind {clip.kind}"] += 1
        elif clip.quality < latent_set.min_quality:
            left_out[f"of quality below {latent_set.min_quality:g}"] += 1
        elif min(clip.height, clip.width) < latent_set.min_side:
            left_out[f"narrower than {latent_set.min_side} pixels"] += 1
        elif latent_set.pairs and clip.worse is None:
            left_out["without a worse_file_path"] += 1
        else:
            seen = frames_of(latent_set, clip), clip.height, clip.width
            shape = latent_set.budget.choose(*seen, clip.name)
            if shape is None:
                left_out[f"that {latent_set.budget.admissible(*seen)[1]}"] += 1
                continue
            clip = clip if latent_set.pairs else replace(clip, worse=None)
            jobs.append(make_job(latent_set, clip, shape, _rng(seed, latent_set.name, clip.name)))
    if left_out:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        logger.info(
            f"set {latent_set.name!r}: {len(jobs)} of {len(clips)} clips; left out: {reasons}"
        )
    if not jobs and latent_set.pairs and not any(clip.worse for clip in clips):
        raise ValueError(
            f"set {latent_set.name!r} has pairs=True, and none of {len(clips)} clips has a "
            f"worse_file_path; add this column to the table, or leave pairs out"
        )
    if not jobs:
        raise ValueError(
            f"set {latent_set.name!r}: none of {len(clips)} clips is of kind "
            f"{'/'.join(latent_set.kinds)}, at least {latent_set.min_side} pixels wide, of "
            f"quality {latent_set.min_quality} or more (only curation rates clips), and large "
            f"enough for {latent_set.budget}; change the set or add clips"
        )
    return sorted(jobs, key=lambda job: (job.shape, job.clip.name))


class Quarantine:
    """A JSON-lines file of what was left out of rows and clips; no line stands in it twice.

    A store cannot append: there the file is written at the end.
    """

    def __init__(self, path: Place):
        self.path = path
        text = path.read_text("utf-8") if path.is_file() else ""
        self.lines = dict.fromkeys(filter(None, text.split("\n")))

    def add(self, line: str) -> None:
        """Append a line, unless the file already has it. On a full disk append nothing."""
        if line in self.lines:
            return
        self.lines[line] = None
        if isinstance(self.path, Remote):
            return
        content = (line + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError as error:
                file.truncate(size)
                error.filename = str(self.path)
                raise

    def forget(self, files: Collection[str], *, but: Sequence[str]) -> None:
        """Remove the lines of these files, except the lines `but`, which the file then has.

        A file without a line is removed.
        """
        old = [line for line in self.lines if _file_of(line) not in files]
        lines = dict.fromkeys([*but, *old])
        if lines and (set(lines) != set(self.lines) or isinstance(self.path, Remote)):
            replace_text(self.path, "".join(f"{line}\n" for line in lines))
        elif not lines:
            self.path.unlink(missing_ok=True)
        self.lines = lines


class Reader:
    """Reads and encodes the jobs of a set; raises ValueError after too many unreadable clips."""

    def __init__(self, latent_set: LatentSet, jobs: int, encoder, quarantine, seed: int, progress):
        self.latent_set, self.jobs, self.encoder, self.seed = latent_set, jobs, encoder, seed
        self.quarantine, self.progress, self.bad = quarantine, progress, 0

    def __call__(self, jobs: Sequence[Job], kinds: Sequence[Collection[str]]) -> list:
        """Return for each job its entries of some kinds, or its line in the quarantine.

        While a group of clips is encoded, the next ones are decoded.
        """
        results, waiting = [], deque()
        groups = self._groups(jobs, kinds)
        with ThreadPoolExecutor() as pool:
            for group, wanted in groups:
                waiting.append(([pool.submit(self._read, job) for job in group], group, wanted))
                if len(waiting) > AHEAD:
                    results += self._encoded(*waiting.popleft())
            while waiting:
                results += self._encoded(*waiting.popleft())
        return results

    def _encoded(self, reads: Sequence[Future], group: Sequence[Job], wanted) -> list:
        found = [read.result() for read in reads]
        found = [
            self._leave_out(job, one) if isinstance(one, ValueError) else one
            for job, one in zip(group, found, strict=True)
        ]
        good = [one for one in found if not isinstance(one, str)]
        made = iter(encode_pixels(self.encoder, good, wanted) if good else ())
        self.progress.update(len(group))
        return [one if isinstance(one, str) else next(made) for one in found]

    def _groups(self, jobs: Sequence[Job], kinds: Sequence) -> Iterator[tuple]:
        """Yield groups of neighbouring jobs of one shape and wanted kinds, encoded together."""
        both = zip(jobs, kinds, strict=True)
        for (shape, wanted), same in itertools.groupby(both, lambda one: (one[0].shape, one[1])):
            while group := list(itertools.islice(same, self.encoder.rows(shape))):
                yield [job for job, _ in group], wanted

    def _read(self, job: Job) -> Pixels | ValueError:
        def rng(*names):
            return _rng(self.seed, self.latent_set.name, job.clip.name, *names)

        draws = [rng(draw) for draw in range(self.latent_set.condition_draws)]
        try:
            return read_pixels(job, draws, rng("reference"))
        except ValueError as error:
            return error

    def _leave_out(self, job: Job, error: ValueError) -> str:
        self.bad += 1
        line = _line({"file": job.clip.name, "reason": shown(str(error))})
        self.quarantine.add(line)
        if self.bad > max(1, MAX_BAD * self.jobs):
            raise ValueError(
                f"set {self.latent_set.name!r}: {self.bad} of {self.jobs} clips cannot be read; "
                f"repair or remove them. The reasons are in {self.quarantine.path}"
            )
        return line


def _line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False)


def _file_of(line: str) -> str | None:
    try:
        return json.loads(line)["file"]
    except (ValueError, KeyError, TypeError):  # cut short by a kill
        return None


def _rng(seed: int, *names) -> np.random.Generator:
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).hexdigest()
    return np.random.default_rng([seed, int(digest, 16)])
