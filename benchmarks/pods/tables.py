"""Compile the 12B stages for pods that are absent, and write the tables of the pages on pods.

`python benchmarks/pods/tables.py` compiles, one after the other, all stages without figures of the
current code and config under benchmarks/results/pods. It writes the table into the English and the
Chinese page after each stage, so you may stop and restart it. `--only-tables` compiles nothing.
Names of figures as arguments compile only those. A stage takes 5 to 11 minutes of a core and 3 GB.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: no local device is used
import jax

from easyanimate_jax.commands.parse import load_config
from easyanimate_jax.pods.compile import longest, pod_mesh
from easyanimate_jax.pods.report import markdown
from easyanimate_jax.training.compile import StageReport, describe_stage, trace_stage
from easyanimate_jax.training.program import COMPILER_OPTIONS

RESULTS = Path("benchmarks/results/pods")
PAGES = (Path("docs/pods.md"), Path("docs/zh/pods.md"))
V5, CONTROL = "configs/v5_12b.py", "configs/v5_12b_control.py"
WIDE = "configs/tpu_12b.py"
STAGES = {  # part of a figure's name: config, stage
    **{s: (V5, s) for s in ("image", "3328_t2v", "13312_t2v", "13312_i2v", "53248_i2v")},
    **{s: (CONTROL, s) for s in ("13312_control", "53248_control")},
    **{f"tpu_{s}": (WIDE, s) for s in ("image", "3328_t2v", "13312_t2v", "13312_i2v", "53248_i2v")},
}
# How each pod runs a stage: fsdp x context, rows of a microbatch, and what is kept. These are the
# choices that `aot --suggest` expects to be fastest, as far as they fit.
SOME = ("attention", "mlp out", "attention out")
MOST = (*SOME, "qkv")
ALL = (*MOST, "mlp")
LEAN = ("attention", "mlp out", "qkv")
# 128 devices of about 100 GB: the mesh of the configs.
SMALL = {
    "image": (16, 8, 768, ALL),
    "3328_t2v": (16, 8, 768, ALL),
    "13312_t2v": (16, 8, 256, MOST),
    "13312_i2v": (16, 8, 192, ALL),
    "53248_i2v": (16, 8, 16, ALL),
    "13312_control": (16, 8, 128, ALL),
    "53248_control": (16, 8, 48, ALL),
}
# 512 of them: the whole batch at once. A batch of 53248 has few rows, so each uses more devices.
LARGE = {
    "image": (64, 8, 1536, ALL),
    "3328_t2v": (64, 8, 1536, ALL),
    "13312_t2v": (64, 8, 768, ALL),
    "13312_i2v": (64, 8, 384, ALL),
    "53248_i2v": (32, 16, 196, ALL),
    "13312_control": (64, 8, 128, ALL),
    "53248_control": (32, 16, 96, ALL),
}
# 256 devices of 32 GB in a torus of 16x16, for 48 heads; 24 do not divide among 16 devices.
TORUS = {
    "image": (16, 16, 768, LEAN),
    "3328_t2v": (16, 16, 768, LEAN),
    "13312_t2v": (16, 16, 256, SOME),
    "13312_i2v": (16, 16, 128, ALL),
    "53248_i2v": (16, 16, 16, ALL),
    "13312_control": (16, 16, 128, ALL),
    "53248_control": (16, 16, 32, MOST),
    "tpu_image": (32, 8, 768, MOST),
    "tpu_3328_t2v": (32, 8, 768, MOST),
    "tpu_13312_t2v": (32, 8, 256, SOME),
    "tpu_13312_i2v": (32, 8, 128, ALL),
    "tpu_53248_i2v": (32, 8, 32, MOST),
}
PODS = {  # part of a figure's name: topology, choices
    "v5p-128": ("v5p:4x4x8", SMALL),
    "v5p-512": ("v5p:8x8x8", LARGE),
    "v6e-256": ("v6e:16x16", TORUS),
    "tpu7x-64": ("tpu7x:4x4x4", SMALL),
}


def overrides(pod: str, name: str) -> tuple[str, ...]:
    """Return the options with which a pod runs a stage."""
    config, stage = STAGES[name]
    index = [s.name for s in load_config(config, ()).stages].index(stage)
    choices = PODS[pod][1]
    fsdp, context, rows, kept = choices.get(name) or choices[stage]
    option = f"--stages.{index}"
    mesh = (f"{option}.mesh.fsdp", str(fsdp), f"{option}.mesh.context", str(context))
    return (*mesh, f"{option}.microbatch", str(rows), f"{option}.save", *kept)


RUNS = {  # name of the figures: config, topology, stage, overrides
    f"{pod}_{name}": (STAGES[name][0], topology, STAGES[name][1], overrides(pod, name))
    for pod, (topology, _) in PODS.items()
    for name in STAGES
}
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


@cache
def fingerprint(name: str) -> str:
    """Return a hash of the traced step, its placement and the compiler; other figures are stale.

    The hash excludes addresses, and the names of functions that choose which activations to save:
    their choice is part of the program.
    """
    path, topology, stage, overrides = RUNS[name]
    config = load_config(path, overrides)
    stage = next(s for s in config.stages if s.name == stage)
    mesh, chip = pod_mesh(config, stage, topology)
    with jax.set_mesh(mesh):
        sizes = longest(config, stage)
        _, placed, arguments = describe_stage(config.step, stage, mesh, **sizes, memory=0)
        program = str(trace_stage(config.step, stage, placed, arguments).jaxpr)
    values = [re.sub(r"0x[0-9a-f]+|policy=.*", "", program)]
    values += [str(x.sharding.spec) for x in jax.tree.leaves(arguments)]
    values += [str([device.id for device in mesh.devices.flat]), topology]
    values += [str(COMPILER_OPTIONS.get(chip.device_kind)), version("jaxlib"), version("libtpu")]
    return hashlib.sha256("\n".join(values).encode()).hexdigest()[:16]


def read(name: str) -> dict | None:
    """Return the figures of a name, or None without a file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def compile_run(name: str) -> None:
    """Compile, and write the figures with their command and fingerprint."""
    config, topology, stage, overrides = RUNS[name]
    path, made_of = RESULTS / f"{name}.json", fingerprint(name)
    new = path.with_suffix(".new")
    command = ["-m", "easyanimate_jax", "aot", config, "--topology", topology, "--stage", stage]
    command = [*command, *overrides]
    print(f"python {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command, "--json", str(new)]).returncode
    if code not in (0, 1):  # 1 is a result too: the stage does not fit
        sys.exit(code)
    figures = {"command": f"python {' '.join(command)}", "made_of": made_of}
    path.write_text(json.dumps(figures | json.loads(new.read_text()), indent=1), "utf-8")
    new.unlink()


def tables() -> str:
    """Return one Markdown table of all figures; a star marks those of earlier code."""
    reports = []
    for name in RUNS:
        figures = read(name)
        if figures:
            fields = {"save": []} | figures["stages"][0]  # earlier figures do not say it
            for key in ("save", "predicted_step_seconds_range"):
                fields[key] = tuple(fields[key])
            report = StageReport(**fields)
            star = "" if figures["made_of"] == fingerprint(name) else " *"
            model = Path(RUNS[name][0]).stem
            report.name = f"{report.topology} {model} {report.name}{star}"
            reports.append(report)
    return markdown(reports)


def main(arguments: list[str]) -> None:
    """Compile the stale figures, and write the tables."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stale = [n for n in RUNS if (read(n) or {}).get("made_of") != fingerprint(n)]
    chosen = [] if arguments == ["--only-tables"] else arguments or stale
    _write_pages()
    for name in chosen:
        compile_run(name)
        _write_pages()


def _write_pages() -> None:
    table = tables()
    for page in PAGES:
        text = page.read_text("utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
