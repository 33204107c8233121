"""Compiles the 12B stages for pods that are not there, and writes the tables of docs/pods.md.

`python benchmarks/pods/tables.py` compiles what has no figures yet under benchmarks/results/pods
and then writes the tables; `--only-tables` compiles nothing; names of figures as arguments compile
those again. A stage takes 2 to 4 minutes of one core and 1.5 GB.
"""

import json
import subprocess
import sys
from pathlib import Path

RESULTS = Path("benchmarks/results/pods")
PAGE = Path("docs/pods.md")
V5, CONTROL = "configs/v5_12b.py", "configs/v5_12b_control.py"
LEAN = ("--model.save", "attention")  # for chips with 32 GB
RUNS = {  # name of the figures: config, topology, stage, overrides
    "v5p-128_image": (V5, "v5p:4x4x8", "image", ()),
    "v5p-128_3328_t2v": (V5, "v5p:4x4x8", "3328_t2v", ()),
    "v5p-128_13312_t2v": (V5, "v5p:4x4x8", "13312_t2v", ()),
    "v5p-128_13312_i2v": (V5, "v5p:4x4x8", "13312_i2v", ()),
    "v5p-128_53248_i2v": (V5, "v5p:4x4x8", "53248_i2v", ()),
    "v5p-128_13312_control": (CONTROL, "v5p:4x4x8", "13312_control", ()),
    "v5p-128_53248_control": (CONTROL, "v5p:4x4x8", "53248_control", ()),
    "v6e-256_13312_t2v": (V5, "v6e:16x16", "13312_t2v", LEAN),
    "v5p-512_13312_t2v": (V5, "v5p:8x8x8", "13312_t2v", ()),
}
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def compile_run(name: str) -> None:
    config, topology, stage, overrides = RUNS[name]
    command = [sys.executable, "-m", "easyanimate_jax.aot", config, "--topology", topology]
    command += ["--stage", stage, "--json", str(RESULTS / f"{name}.json"), *overrides]
    print(" ".join(command[1:]), flush=True)
    code = subprocess.run(command).returncode
    if code not in (0, 1):  # 1: a stage that does not fit, which is a result
        sys.exit(code)


def tables() -> str:
    """One Markdown table of every figure that is there, as many rows as RUNS has."""
    from easyanimate_jax.aot.compile import StageReport
    from easyanimate_jax.aot.report import markdown

    reports = []
    for name in RUNS:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            (stage,) = json.loads(path.read_text())["stages"]
            report = StageReport(**stage)
            report.name = f"{report.topology} {report.name}"
            reports.append(report)
    return markdown(reports)


def main(arguments: list[str]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    if "--only-tables" not in arguments:
        missing = [name for name in RUNS if not (RESULTS / f"{name}.json").is_file()]
        for name in arguments or missing:
            compile_run(name)
    page = PAGE.read_text("utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
