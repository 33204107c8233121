"""Count what the five sets of the report take: by arithmetic, and from records that were written.

Before: a record held all of a clip, with the padded states of its captions, in every set. Now: a
set holds latents and conditions, and the states of a caption are stored once for all sets, without
the states of masked padding. Records with the real shapes are written by the code that `prepare`
uses and their bytes compared with the arithmetic. Writes benchmarks/results/set_bytes.md.

    python benchmarks/set_bytes.py [--gb 1.2]
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clip_records import CAPTION_TOKENS, CAPTIONS, ROOT, WIDTH, masks, record, text_shapes, write
from safetensors.numpy import save
from setting import setting
from tqdm import tqdm

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.data.records import LatentSet
from easyanimate_jax.runs.config import TrainConfig

RESULT = ROOT / "benchmarks" / "results" / "set_bytes.md"
CLIPS = {  # millions of clips of each set, in the order of the config; and with captions in all
    "configs/v5_12b.py": ((10.0, 26.6, 17.9, 0.5, 0.5), 36.6),
    "configs/v51_12b.py": ((10.0, 36.6, 27.9, 0.5, 0.5), 36.6),
}
HALF = 2  # bytes of a number
MASK = 4  # numbers of a token's mask
WRITTEN = 1000  # records of the smallest set, and of the others if they fit --gb


class Bytes(NamedTuple):
    """Bytes of a clip's parts, without what names them."""

    latents: int  # mean and log-variance of the clip
    conditions: int
    text: int  # states of all captions, as stored now
    padded: int  # the same with all padding

    @property
    def before(self) -> int:
        """Return the bytes of a record that held all."""
        return self.latents + self.conditions + self.padded

    @property
    def now(self) -> int:
        """Return the bytes of a clip in its set; the text is stored once for all sets."""
        return self.latents + self.conditions


def clip_bytes(config: TrainConfig, latents: LatentSet) -> Bytes:
    """Return the bytes of a clip of a set, of the set's nominal number of tokens."""
    tokens, shapes = latents.budget.tokens, text_shapes(config)
    condition = HALF * (2 * WIDTH + MASK)
    rows = [min(length, CAPTION_TOKENS + 1) if masks(config) else length for length, _ in shapes]
    return Bytes(
        latents=tokens * HALF * 2 * WIDTH,
        conditions=tokens * latents.condition_draws * condition,
        text=CAPTIONS * sum(HALF * n * width for n, (_, width) in zip(rows, shapes, strict=True)),
        padded=CAPTIONS * sum(HALF * n * width for n, width in shapes),
    )


def terabytes(path: str) -> tuple[float, float, float]:
    """Return TB of all sets of a config: before; now without texts; the texts."""
    config = load_config(path, ())
    counts, captioned = CLIPS[path]
    sizes = [clip_bytes(config, latents) for latents in config.sets]
    before = sum(count * size.before for count, size in zip(counts, sizes, strict=True)) / 1e6
    now = sum(count * size.now for count, size in zip(counts, sizes, strict=True)) / 1e6
    return before, now, captioned * sizes[0].text / 1e6


def measure(config: TrainConfig, latents: LatentSet, count: int) -> tuple[int, float, float, int]:
    """Write records; return (count, bytes of one in its set, of its texts, of one lump of all)."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        write(folder, config, latents, latents.budget.tokens, count)
        own, texts = (_on_disk(folder / part) / count for part in (latents.name, "texts"))
    return count, own, texts, len(save(record(config, latents, latents.budget.tokens)))


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def page(rows: dict[str, Sequence[tuple[LatentSet, tuple]]], most: float) -> str:
    """Return the result as Markdown."""
    lines = [
        "# Bytes of the report's sets",
        "",
        f"{setting()} Records were written and deleted: {WRITTEN:,} of the first set, and at most "
        f"{most / 1e9:.1f} GB of each other one.",
        "",
        f"Numbers of clips are the report's. Assumed: {CAPTIONS} captions a clip, of "
        f"{CAPTION_TOKENS} tokens in Qwen2's vocabulary, and pictures beside the "
        f"26.6 million clips. A record has the nominal number of tokens. Random numbers, written "
        f"by the code of `prepare`; nothing is compressed. Before: a record as one safetensors "
        f"file, without the container's own bytes.",
    ]
    for path, found in rows.items():
        config, (counts, captioned) = load_config(path, ()), CLIPS[path]
        before, now, texts = terabytes(path)
        lines += [
            "",
            f"## {path}",
            "",
            "| set | million clips | MB a clip before | measured | TB before | MB a clip now "
            "| measured | TB now | records written |",
            f"|{'---|' * 9}",
        ]
        for count, (latents, (written, own, _, lump)) in zip(counts, found, strict=True):
            size = clip_bytes(config, latents)
            values = [latents.name, f"{count:.1f}", *_pair(size.before, lump)]
            values += [f"{count * size.before / 1e6:.1f}", *_pair(size.now, own)]
            lines.append(
                f"| {' | '.join([*values, f'{count * size.now / 1e6:.1f}'])} | {written} |"
            )
        size, (written, _, one, _) = clip_bytes(config, found[0][0]), found[0][1]
        stored = f"{' | '.join(_pair(size.text, one))} | {texts:.1f} | {written}"
        lines.append(f"| texts, once | {captioned:.1f} | | | in every set | {stored} |")
        lines.append(f"| sum | | | | {before:.1f} | | | {now + texts:.1f} | |")
    return "\n".join([*lines, ""])


def _pair(wanted: float, found: float) -> list[str]:
    return [f"{wanted / 1e6:.3f}", f"{found / 1e6:.3f} ({found / wanted - 1:+.2%})"]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.2, help="of a set but the first")
    most, rows = 1e9 * parser.parse_args().gb, {}
    bar = tqdm(total=sum(len(counts) for counts, _ in CLIPS.values()), desc="sets", unit="set")
    for path in CLIPS:
        config, rows[path] = load_config(path, ()), []
        for latents in config.sets:
            size = clip_bytes(config, latents)
            count = min(WRITTEN, int(most / (size.now + size.text))) if rows[path] else WRITTEN
            rows[path].append((latents, measure(config, latents, count)))
            bar.update()
    bar.close()
    RESULT.write_text(page(rows, most))
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
