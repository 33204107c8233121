"""Measure sampling with little memory: parts that take turns, and the transformer in 8 bits.

* The peak memory of a process that loads the random parts of a run, a few hundred MB each, in the
  order of sampling: with all parts in memory, with `--memory low`, and with int8 too.
* Two blocks of the 12B's width, random, in bfloat16: their bytes, and the change of their output.
* With a run of the demo: the scores of the prompts for both, and the distance of the videos.

Writes benchmarks/results/memory.md.

    python benchmarks/memory.py [RUN] [--rows 16] [--steps 20]
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from setting import setting

from demos import world
from demos.generate import psnr
from demos.score import score
from easyanimate_jax import (
    CausalVAE,
    MMDiT,
    MMDiTConfig,
    Request,
    Sampling,
    VAEConfig,
    load_pipeline,
    text_to_video,
)
from easyanimate_jax.models.storage import store
from easyanimate_jax.runs.config import load, to_json
from easyanimate_jax.text.train import word_tokenizer
from easyanimate_jax.training.checkpoint import Checkpoints
from easyanimate_jax.training.step import TrainState
from easyanimate_jax.weights.module import save_module, with_weights

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "memory.md"
WAYS = {  # options of load_pipeline
    "as it is": {},
    "`--memory low`": {"low_memory": True},
    "`--memory low --weights int8`": {"low_memory": True, "int8": True},
}
LOAD = """
import json, sys
import jax
from easyanimate_jax.weights.conversion import peak_rss  # getrusage's outlives fork and exec
from easyanimate_jax.runs.load import load_pipeline
run = load_pipeline(sys.argv[1], **json.loads(sys.argv[2]))
before = peak_rss()
assert run.encoder
jax.block_until_ready(run.diffusion.model)
jax.block_until_ready(run.diffusion.vae)
print(before / 2**30, peak_rss() / 2**30)
"""
NAMES = ("colour", "background", "direction", "speed", "shape")
WIDE = MMDiTConfig(
    depth=2, mmdit_depth=2, heads=48, text_widths=(3584,), text_norm=True, round_time=True
)


def main() -> None:
    """Measure all cases, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("run", nargs="?", help="folder of a finished demo")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--steps", type=int, default=20)
    a = p.parse_args()
    lines = ["# Sampling in little memory", "", setting(), "", *resident(), *wide()]
    lines += demo(a) if a.run else []
    RESULT.write_text("\n".join([*lines, ""]))
    print(RESULT.read_text())


def resident() -> list[str]:
    lines = ["| random parts, loaded | GiB resident at most | before |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_run(Path(folder))
        for name, options in WAYS.items():
            command = [sys.executable, "-c", LOAD, f"{folder}/run", json.dumps(options)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            before, peak = map(float, done.stdout.split()[-2:])
            lines.append(f"| {name} | {peak:.2f} | {before:.2f} |")
    parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in sizes.items())
    return [*lines, "", f"MiB of weights on disk: {parts}.", ""]


def make_run(folder: Path) -> dict[str, int]:
    """Write a run with random parts; return the bytes of each part."""
    import torch
    import transformers

    model = MMDiTConfig(
        depth=5,
        mmdit_depth=5,
        heads=16,
        text_widths=(1024, 1024),
        text_norm=False,
        round_time=True,
    )
    transformer = jax.jit(lambda: MMDiT(model, rngs=nnx.Rngs(0)))()
    vae = jax.jit(lambda: CausalVAE(VAEConfig(), rngs=nnx.Rngs(1)))()
    save_module(folder / "vae", vae)
    tokenizer = word_tokenizer([prompt.en for prompt in world.every_prompt()])
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        num_hidden_layers=10,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    for name in ("text_encoder", "text_encoder_2"):
        transformers.BertModel(bert).save_pretrained(folder / name)
    config = dataclasses.replace(
        load("configs/demo.py"), model=model, vae=str(folder / "vae"), text=str(folder)
    )
    meta = {"in_channels": 16, "config": json.loads(to_json(config))}
    zero = jnp.zeros((), jnp.int32)
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=1)
    checkpoints.save(1, TrainState(zero, zero, transformer, transformer, ()), meta)
    checkpoints.close()
    encoders = sum(p.stat().st_size for p in folder.glob("text_encoder*/*.safetensors"))
    nbytes = lambda module: sum(x.nbytes for x in jax.tree.leaves(module))  # noqa: E731
    return {"text encoders": encoders, "transformer": nbytes(transformer), "VAE": nbytes(vae)}


def wide() -> list[str]:
    """Return the bytes and the output change of two blocks of full width."""
    rng = np.random.default_rng(0)
    shapes = nnx.eval_shape(lambda: MMDiT(WIDE, rngs=nnx.Rngs(0)))

    def draw(name, weight):
        x = rng.standard_normal(weight.shape, np.float32)
        if name.endswith("kernel"):
            return jnp.asarray(x / np.sqrt(weight.shape[-2]), WIDE.dtype)
        return jnp.asarray(0.1 * x + name.endswith("scale"))

    full = with_weights(shapes, draw)
    small = jax.tree.map(lambda x: x, full)
    store(small, "int8")
    inputs = (
        jnp.asarray(rng.standard_normal((1, 64, 64), np.float32)),
        jnp.array([[1, 8, 8]]),
        jnp.array([64]),
        jnp.array([500.0]),
        (jnp.asarray(rng.standard_normal((1, 32, 3584), np.float32)),),
    )
    run = jax.jit(lambda model, inputs: model(*inputs).astype(jnp.float32))
    ours, theirs = run(small, inputs), run(full, inputs)
    error = float(jnp.sqrt(jnp.mean((ours - theirs) ** 2) / jnp.mean(theirs**2)))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(m.blocks)) / 2**20 for m in (full, small)]
    return [
        f"Two blocks of width {WIDE.width}: {sizes[0]:.0f} MiB in bfloat16, {sizes[1]:.0f} MiB in "
        f"int8 ({sizes[1] / sizes[0]:.3f}); root mean square error of the output "
        f"{100 * error:.2f} % of its size.",
        "",
    ]


def demo(a) -> list[str]:
    """Return the scores of a demo's prompts for both, from the same noise."""
    videos, lines = {}, []
    for name, small in (("full", False), ("int8", True)):
        run = load_pipeline(a.run, int8=small)
        samples = run.config.samples
        prompts = world.prompts("seen", a.rows, seed=samples.seed)
        request = Request(
            run.encoder.encode([prompt.en for prompt in prompts]),
            run.encoder.encode([""]),
            size=(samples.frames, samples.height, samples.width),
            seeds=list(range(a.rows)),
            sampling=Sampling(steps=a.steps, guidance=samples.guidance),
        )
        videos[name] = text_to_video(run.diffusion, request)
        found = score(videos[name], prompts)
        size = sum(x.nbytes for x in jax.tree.leaves(run.diffusion.model)) / 2**20
        lines.append(
            f"| {name} | {size:.1f} | " + " | ".join(f"{found[n]:.2f}" for n in NAMES) + " |"
        )
    return [
        f"The demo, {a.run}, {a.rows} prompts, {a.steps} steps; the videos are "
        f"{psnr(videos['full'], videos['int8']):.1f} dB apart.",
        "",
        "| weights | MiB | " + " | ".join(NAMES) + " |",
        "|---|---|" + "---|" * len(NAMES),
        *lines,
    ]


if __name__ == "__main__":
    main()
