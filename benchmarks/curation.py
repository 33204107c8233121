"""Measure `curate` where all films are finished: it looks them up, judges and writes their rows.

Films are files of a few bytes with made-up records of ten clips each, with the built-in scores,
random hashes and a caption. Writes benchmarks/results/curation.md.

    python benchmarks/curation.py [--clips 1000000]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from setting import setting

from easyanimate_jax.prepare.curate import curate
from easyanimate_jax.prepare.film_folder import FilmFolder, base_row
from easyanimate_jax.prepare.films import Films, Rules
from easyanimate_jax.prepare.model_steps import Models, ModelSteps
from easyanimate_jax.prepare.scores import SCORES

RESULT = Path(__file__).parent / "results" / "curation.md"
CLIPS = 10  # of a film
RULES = Rules()


def main() -> None:
    """Make the films, curate them in another process, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--folder", help="curate what was made there, and print a row")
    own = parser.parse_args()
    if own.folder:
        print(measured(Path(own.folder)))
        return
    lines = [
        "| clips | films | files of records | their bytes a clip | seconds | CPU seconds | peak of "
        "the process, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for clips in (own.clips // 10, own.clips):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), clips // CLIPS)
            command = [sys.executable, __file__, "--folder", folder]
            ran = subprocess.run(command, capture_output=True, text=True)
            lines.append(ran.stdout.strip().splitlines()[-1] if ran.stdout else ran.stderr)
    RESULT.write_text("\n".join(["# The table of curate", "", setting(), "", *lines, ""]))
    print(RESULT.read_text())


def make(folder: Path, count: int) -> None:
    """Make films and their records."""
    films, rng = folder / "films", np.random.default_rng(0)
    rows = []
    for number in range(count):
        name = f"{number % 1000:03d}/{number}.mp4"
        (films / name).parent.mkdir(parents=True, exist_ok=True)
        (films / name).write_text(name)
        rows.append({"file_path": name, "text": f"film {number} of a red fox", "type": "video"})
    (films / "metadata.json").write_text(json.dumps(rows))
    steps = ModelSteps(Models(), SCORES, RULES.min_pixels)
    made = Films(folder / "out", FilmFolder(films, None), RULES, SCORES, steps)
    for name in made.names():
        film = made.folder.films[name]
        base = base_row(name) | {"fps": 24.0, "height": 720, "width": 1280, "film_frames": 2000}
        found = []
        for clip in range(CLIPS):
            row = base | {"clip": f"{name}#{clip * 200}-{clip * 200 + 200}", "first": clip * 200}
            row |= {"frames": 200, "hash": int(rng.integers(2**63))}
            row |= {score.name: float(rng.uniform(0, 25)) for score in SCORES}
            found.append(steps.tell(row, film, None) if steps.wants(row) else row)
        made.store.write(*made._at(name), {"key": made._key(name), "rows": found})
    made.store.flush()


def measured(folder: Path) -> str:
    """Return a row of the result."""
    began, spent = time.perf_counter(), time.process_time()
    funnel = curate(folder / "films", folder / "out")
    seconds, spent = time.perf_counter() - began, time.process_time() - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = list((folder / "out" / "films").rglob("*.jsonl"))
    clips = funnel.reasons.total()
    size = sum(file.stat().st_size for file in files) / clips
    return (
        f"| {clips:,} | {clips // CLIPS:,} | {len(files):,} | {size:.0f} | {seconds:.0f} | "
        f"{spent:.0f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
