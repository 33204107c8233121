"""Score a finished run and write `report.json` and `report.html` beside it:

python -m demos world|films|ways|concept|distill|preference CONFIG [--field value ...]

`ways` needs a control model of the world whose `init` is a run that ends as an inpaint model.
`concept` needs a LoRA whose `init` is a run of the world, and `distill` a student of such a run.
`preference` needs a run that learned from ratings, and the weights of `python -m demos.judge`.
"""

import json
import sys
import time
from pathlib import Path

from demos import (
    concept_report,
    distill_report,
    facts,
    films_report,
    preference_report,
    ways_report,
    world_report,
)
from easyanimate_jax import TextEncoder, load_config, load_pipeline

KINDS = {"world": world_report, "films": films_report, "ways": ways_report}
KINDS |= {"concept": concept_report, "distill": distill_report}
KINDS |= {"preference": preference_report}


def main(args: list[str]) -> int:
    """Score the run of a config, write its report, and return the exit code."""
    if len(args) < 2 or args[0] not in KINDS:
        print(__doc__, file=sys.stderr)
        return 2
    kind, config = KINDS[args[0]], load_config(args[1], args[2:])
    began, rows = time.time(), facts.read_metrics(config)
    runs = [load_pipeline(config.run)]
    if kind not in (world_report, films_report):
        runs.append(load_pipeline(config.init, step=config.init_step))
    results, shown = kind.evaluate(TextEncoder.load(config.text), *runs)
    results |= facts.training_facts(config, rows)
    results["evaluation_seconds"] = round(time.time() - began, 1)
    root = Path(config.run).parent
    started = root / "started"
    if started.is_file():  # created by make when the first command starts
        results["seconds"] = round(time.time() - started.stat().st_mtime)
    (root / "report.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (root / "report.html").write_text(kind.page(config, results, shown, rows), encoding="utf-8")
    print(f"{kind.summary(results)}\n{root / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
