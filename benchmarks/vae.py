"""Measure seconds and memory of decoding by a full-size autoencoder, compared with diffusers'.

The weights are random, in the released shapes and bfloat16. Decoding is chunked as in sampling, one
latent frame at a time. Each decode has its own process; memory is its peak RSS, and our seconds
include compilation. For the large video the result shows the compiler's plan, and with --whole the
measured decode of V5.1. Writes benchmarks/results/vae.md.

    python benchmarks/vae.py [--frames 9] [--side 128] [--whole]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "vae.md"
LARGE = 49, 512


def main() -> None:
    """Measure all decodes, and write the result."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--frames", type=int, default=9, help="frames of the video that both decode")
    p.add_argument("--side", type=int, default=128)
    p.add_argument("--whole", action="store_true", help="decode 49 x 512 x 512 too: about 1 hour")
    p.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        way, version, frames, side = a.child
        print(json.dumps(WAYS[way](version == "V5", int(frames), int(side))))
        return
    small = [("ours", "V5.1"), ("diffusers", "V5.1"), ("ours", "V5")]
    rows = [measure(*who, a.frames, a.side) for who in small]
    rows += [measure("ours", "V5.1", *LARGE)] if a.whole else []
    plans = [measure("plan", version, *LARGE) for version in ("V5.1", "V5")]
    RESULT.write_text(table(rows, plans))
    print(RESULT.read_text())


def measure(way: str, version: str, frames: int, side: int) -> dict:
    """Return the result of one decode, run in a new process."""
    command = [sys.executable, __file__, "--child", way, version, str(frames), str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {
        "way": way,
        "version": version,
        "size": f"{frames} x {side} x {side}",
    }


def timed(run) -> dict:
    """Time a decode; return its seconds, CPU seconds and memory."""
    before = peak()
    began, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": peak()}


def peak() -> float:
    """Return the peak RSS of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def latent_shape(frames: int, side: int) -> tuple[int, ...]:
    """Return the shape of the latents of a square video."""
    return 1, (frames - 1) // 4 + 1, side // 8, side // 8, 16


def ours(attention: bool, frames: int, side: int) -> dict:
    """Decode with our model, compiled."""
    import jax
    import numpy as np
    from flax import nnx

    from easyanimate_jax.models.vae import CausalVAE, VAEConfig
    from easyanimate_jax.runs.load import as_computed

    config = VAEConfig(attention=attention)
    vae = jax.jit(lambda: as_computed(CausalVAE(config, rngs=nnx.Rngs(0))))()
    z = jax.random.normal(jax.random.key(0), latent_shape(frames, side))
    return timed(lambda: np.asarray(jax.jit(lambda vae, z: vae.chunked_decode(z))(vae, z)))


def diffusers(attention: bool, frames: int, side: int) -> dict:
    """Decode with diffusers' model: no attention, V5.1's shapes but for the width of the norms."""
    import torch
    from diffusers import AutoencoderKLMagvit

    vae = AutoencoderKLMagvit(block_out_channels=[128, 256, 512, 512], latent_channels=16)
    vae = vae.eval().to(torch.bfloat16)
    B, T, h, w, C = latent_shape(frames, side)
    z = torch.randn(B, C, T, h, w, dtype=torch.bfloat16)
    with torch.inference_mode():
        return timed(lambda: vae.decode(z))


def plan(attention: bool, frames: int, side: int) -> dict:
    """Return the GiB of the compiled decode: its working memory, and the whole VAE's weights."""
    import jax
    from flax import nnx

    from easyanimate_jax.models.vae import CausalVAE, VAEConfig
    from easyanimate_jax.runs.load import as_computed

    config = VAEConfig(attention=attention)
    vae = nnx.eval_shape(lambda: as_computed(CausalVAE(config, rngs=nnx.Rngs(0))))
    vae = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), vae)
    z = jax.ShapeDtypeStruct(latent_shape(frames, side), "float32")
    program = jax.jit(lambda vae, z: vae.chunked_decode(z)).lower(vae, z).compile()
    memory = program.memory_analysis()
    return {
        "working": memory.temp_size_in_bytes / 2**30,
        "weights": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vae)) / 2**30,
        "video": memory.output_size_in_bytes / 2**30,
        "process": peak(),
    }


WAYS = {"ours": ours, "diffusers": diffusers, "plan": plan}


def table(rows, plans) -> str:
    """Return the result as Markdown."""
    from setting import setting

    lines = [
        "# Decoding by a full-size autoencoder, on a CPU",
        "",
        setting(),
        "",
        "Random weights, kernels and computation in bfloat16, one frame of latents at a time. "
        "Seconds of ours are with the compilation.",
        "",
        "| | video | seconds | CPU seconds | GiB resident at most | of these before |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['way']}, {r['version']} | {r['size']} | {r['seconds']:.0f} | {r['cpu']:.0f} "
        f"| {r['peak']:.2f} | {r['before']:.2f} |"
        for r in rows
    ]
    lines += [
        "",
        "What the compiler plans for the large video, in GiB:",
        "",
        "| | video | working memory | weights | the video | process | sum |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in plans:
        parts = [r[name] for name in ("working", "weights", "video", "process")]
        cells = " | ".join(f"{x:.2f}" for x in [*parts, sum(parts)])
        lines.append(f"| ours, {r['version']} | {r['size']} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
