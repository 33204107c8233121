"""Encode captioned files to records: `python -m easyanimate_jax prepare CONFIG`.

Each clip is cropped to a shape of its set's budget and encoded once, to mean and log-variance.
Training reads these tokens and draws new samples. All captions are kept, and several I2V masks with
noised references (spec 6.1) are drawn per clip. A set with `pixels` has only its texts encoded here
(see runs/visits.py).

    OUT/SET/                  the records of one latent set, see data/records.py
    OUT/empty.safetensors     text states of the empty prompt
    OUT/prompts.safetensors   text states of the config's sample prompts
    OUT/quarantine.jsonl      rows and clips that were left out, with the reason
    OUT/cut.jsonl             captions that are too long for a text encoder
    OUT/contents.jsonl        hashes of the files of the source, see data/contents.py

The same command again makes what is missing, and makes again what was made from other content.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from easyanimate_jax.data.contents import Contents, key
from easyanimate_jax.data.records import LatentSet, Texts, write_texts
from easyanimate_jax.data.sources.read import read_clips
from easyanimate_jax.data.sources.rows import Clip
from easyanimate_jax.models.vae import CausalVAE
from easyanimate_jax.prepare.clips import Job, Pixels, frames_of, make_job, read_pixels
from easyanimate_jax.prepare.encode import Encoder, encode_pixels
from easyanimate_jax.prepare.sets import SetMaker
from easyanimate_jax.storage.local import local_path, shown
from easyanimate_jax.storage.lock import FolderLock
from easyanimate_jax.storage.whole import replace_text

logger = logging.getLogger(__name__)

SHARD_SIZE = 128  # records
ROWS = 16  # clips encoded at once, at most
TEXT_ROWS, TEXT_CACHE = 128, 2**30  # prompts encoded at once; bytes of text states in the cache
SHOWN = 10  # clips that a message names
MAX_BAD = 0.05  # share of a set's clips that may be unreadable


def prepare(
    source: str | Path | tuple[str | Path, str | Path],
    output: str | Path,
    sets: Sequence[LatentSet],
    vae: CausalVAE,
    text_encoder,
    prompts: Sequence[str],
    seed: int,
    *,
    weights: dict[str, str],
    shard_size: int = SHARD_SIZE,
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Encode the clips of `source` for every set; return whether all sets are complete.

    `source` may be a pair: the source, and a folder that its links may lead into. A record is kept
    if its film, its control and its captions have the content that it was made from.

    `part` (k, n) makes every n-th shard from the k-th on, so n processes on any hosts can share the
    work. The last process to finish writes the index.

    `text_encoder.encode(prompts)` returns one array of states per encoder. `weights` are the
    fingerprints of the folders of VAE and text encoders; records made with other models are not
    mixed in. Raises ValueError if another process makes this part, and if more than `MAX_BAD` of
    the clips of a set or part are unreadable.
    """
    output = local_path(output)
    with FolderLock(output, option="--prepared", part=part) as lock:
        clips, problems = read_clips(*source if isinstance(source, tuple) else (source,))
        contents = Contents(output / "contents.jsonl")
        made_of = {"weights": weights, "seed": seed, "shard_size": shard_size}
        makers = [
            SetMaker(output / s.name, s, select(s, clips, seed), contents, made_of) for s in sets
        ]
        lock.begun = True  # all settings are accepted
        quarantine = Quarantine(output / "quarantine.jsonl")
        lines = [_line(problem._asdict()) for problem in problems]
        for line in lines if part[0] == 0 else ():
            quarantine.add(line)
        texts = TextStates(text_encoder, Quarantine(output / "cut.jsonl"))
        encoder = Encoder(vae, jax.local_devices(), most=ROWS, announce=logger.info)
        write_texts(output / "empty.safetensors", texts([""]))
        if prompts:
            about = prompts_key(prompts, weights)
            write_texts(output / "prompts.safetensors", texts(prompts), about)
            texts.note_cut([("sample prompt", prompt) for prompt in prompts])
        whole = []
        for maker in makers:
            count, name = maker.jobs(part), maker.latent_set.name
            with tqdm(total=count, desc=name, unit="clip") as progress:
                read = Reader(maker.latent_set, count, encoder, quarantine, seed, progress)
                whole.append(maker.make(part, read, texts, progress))
        if all(whole):
            lines += [line for maker in makers for line in maker.left_out]
            files = {clip.name for clip in clips} | {problem.file for problem in problems}
            quarantine.forget(files, but=lines)
            texts.forget_cut(clips)
        texts.say_cut()
        return all(whole)


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
    """A JSON-lines file of what was left out of rows and clips; no line stands in it twice."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text("utf-8") if path.is_file() else ""
        self.lines = dict.fromkeys(filter(None, text.split("\n")))

    def add(self, line: str) -> None:
        """Append a line, unless the file already has it. On a full disk append nothing."""
        if line in self.lines:
            return
        self.lines[line] = None
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
        """Remove the lines of these files, except the lines `but`, which the file then has."""
        old = [line for line in self.lines if _file_of(line) not in files]
        lines = dict.fromkeys([*but, *old])
        if set(lines) != set(self.lines):
            replace_text(self.path, "".join(f"{line}\n" for line in lines))
            self.lines = lines


class TextStates:
    """Text states as float16, with a cache: each distinct prompt in it is encoded once.

    Captions whose end no encoder reads are noted in the file `cut`.
    """

    def __init__(self, text_encoder, cut: Quarantine):
        self.text_encoder, self.cache = text_encoder, {}
        self.cut, self.long, self.number = cut, [], 0

    def __call__(self, prompts: Sequence[str]) -> Texts:
        """Return the states of `prompts`, one array per encoder.

        Raises ValueError if a state is not finite in float16.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self.cache]
        for i in range(0, len(new), TEXT_ROWS):
            some = new[i : i + TEXT_ROWS]
            states = [np.asarray(s, np.float16) for s in self.text_encoder.encode(some)]
            if not all(np.isfinite(s).all() for s in states):
                raise ValueError(f"text states of {some} are not finite in float16")
            self.cache |= {p: tuple(s[row] for s in states) for row, p in enumerate(some)}
        rows = [self.cache[prompt] for prompt in prompts]
        if len(self.cache) * sum(s.nbytes for s in rows[0]) > TEXT_CACHE:
            self.cache = {}
        return tuple(np.stack(column) for column in zip(*rows, strict=True))

    def note_cut(self, captions: Sequence[tuple[str, str]]) -> None:
        """Note which (clip, caption) pairs have captions that are too long for an encoder."""
        self.number += len(captions)
        for clip, caption in captions:
            if self.text_encoder.is_cut(caption):
                self.long.append(clip)
                self.cut.add(_line({"file": clip, "caption": caption}))

    def forget_cut(self, clips: Sequence[Clip]) -> None:
        """Remove the lines of captions that these clips do not have any more."""
        self.cut = Quarantine(self.cut.path)  # other processes have added lines
        pairs = ({"file": clip.name, "caption": text} for clip in clips for text in clip.captions)
        now = set(map(_line, pairs))
        kept = [line for line in self.cut.lines if line in now]
        self.cut.forget({clip.name for clip in clips}, but=kept)

    def say_cut(self) -> None:
        """Log how many captions were cut, and of which clips."""
        if self.long:
            some = ", ".join(dict.fromkeys(self.long[:SHOWN]))
            logger.warning(
                f"{len(self.long):,} of {self.number:,} captions are too long for a text encoder, "
                f"which does not read their end: {some}{', ...' * (len(self.long) > SHOWN)}. "
                f"{self.cut.path} holds all of them; shorten them, or go on"
            )


class Reader:
    """Reads and encodes the jobs of a set; raises ValueError after too many unreadable clips."""

    def __init__(self, latent_set: LatentSet, jobs: int, encoder, quarantine, seed: int, progress):
        self.latent_set, self.jobs, self.encoder, self.seed = latent_set, jobs, encoder, seed
        self.quarantine, self.progress, self.bad = quarantine, progress, 0

    def __call__(self, jobs: Sequence[Job]) -> list[dict[str, np.ndarray] | str]:
        """Return a record of each job, or its line in the quarantine if it is unreadable."""
        results = []
        with ThreadPoolExecutor() as pool:
            for group in self._groups(jobs):
                found = list(pool.map(self._read, group))
                found = [
                    self._leave_out(job, one) if isinstance(one, ValueError) else one
                    for job, one in zip(group, found, strict=True)
                ]
                good = [one for one in found if not isinstance(one, str)]
                made = iter(encode_pixels(self.encoder, good) if good else ())
                results += [one if isinstance(one, str) else next(made) for one in found]
                self.progress.update(len(group))
        return results

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Yield groups of neighbouring jobs of one shape, as many as are encoded at once."""
        for shape, same in itertools.groupby(jobs, key=lambda job: job.shape):
            while group := list(itertools.islice(same, self.encoder.rows(shape))):
                yield group

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
