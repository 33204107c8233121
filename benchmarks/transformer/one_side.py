"""Run one transformer and one task in this process; print seconds and peak memory as lines of JSON.

`cpu.py` and `gpu.py` start it. Sides: `ours`, `diffusers`, and `compiled`, which is diffusers'
model with each block under torch.compile. Tasks: `forward`, `step` (loss, gradient and AdamW), and
`limits`, which measures the framework's own FLOP/s of a matrix product and of attention in these
shapes. It prints one line per grid, the shortest first, because JAX reports the peak of the
process. The field `extra` holds the rates of `limits`, or the bytes that our compiled program
plans.
"""

import argparse
import ctypes
import json
import math
import resource
import sys
import time
from pathlib import Path

TEXTS = {77: 1024, 256: 2048}  # V5's tokens per prompt: width of their states
HEAD = 64
QUEUED = 5  # calls per wait, so that the time to start a call does not count


def main() -> None:
    """Run the task at each grid, and print the results."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("side", choices=("ours", "diffusers", "compiled"))
    p.add_argument("task", choices=("forward", "step", "limits"))
    for name in ("width", "depth", "repeats"):
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--grids", type=grid_of, nargs="+", required=True, help="such as 13x32x32")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    a = p.parse_args()
    make = ours if a.side == "ours" else diffusers
    if a.task == "limits":
        make = limits if a.side == "ours" else torch_limits
    run_of, peak, device = make(a)
    for grid in a.grids:
        run = run_of(*grid)
        run()  # compiles
        reset_peak()
        seconds = []
        for _ in range(a.repeats):
            began = time.perf_counter()
            extra = run()
            seconds.append(time.perf_counter() - began)
        found = {"seconds": seconds, "peak": peak(), "device": device, "extra": extra}
        print(json.dumps(found), flush=True)


def grid_of(text: str) -> tuple[int, int, int]:
    """Return the grid of a text such as 13x32x32."""
    frames, rows, columns = map(int, text.split("x"))
    return frames, rows, columns


def ours(a):
    """Return (a function from a grid to the task, peak bytes, device name) of our model."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from easyanimate_jax.models.mmdit import MMDiT

    baseline, config = resident(), our_config(a)
    held = a.dtype if a.task == "forward" else "float32"

    def build(key):
        model = MMDiT(config, rngs=nnx.Rngs(params=key))
        return jax.tree.map(lambda x: x.astype(held), model)

    optimizer = optax.adamw(1e-4)

    def loss(model, inputs):
        return jnp.mean((model(*inputs).astype(jnp.float32) - inputs[0]) ** 2)

    def step(model, state, inputs):
        gradient = jax.grad(loss)(model, inputs)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state

    kept = [jax.jit(build)(jax.random.key(0))]
    if a.task == "step":
        kept.append(jax.jit(optimizer.init)(kept[0]))

    def run_of(*grid):
        N = math.prod(grid)
        tokens = jax.random.normal(jax.random.key(1), (1, N, 64))
        texts = tuple(jax.random.normal(jax.random.key(n), (1, n, w)) for n, w in TEXTS.items())
        inputs = tokens, jnp.array([grid]), jnp.array([N]), jnp.array([500.0]), texts
        if a.task == "forward":
            program = jax.jit(lambda model, inputs: model(*inputs)).lower(*kept, inputs).compile()
        else:
            program = jax.jit(step, donate_argnums=(0, 1)).lower(*kept, inputs).compile()

        def run():
            out = jax.block_until_ready(program(*kept, inputs))
            if a.task == "step":
                kept[:] = out
            return planned(program)

        return run

    return run_of, jax_peak(jax, baseline), f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def our_config(a):
    """Return the config of our model."""
    from easyanimate_jax.facts import ACTIVATIONS
    from easyanimate_jax.models.mmdit import MMDiTConfig

    return MMDiTConfig(
        depth=a.depth,
        mmdit_depth=a.depth,
        heads=a.width // HEAD,
        head_width=HEAD,
        text_widths=tuple(TEXTS.values()),
        text_norm=False,
        round_time=False,
        dtype=a.dtype,
        save=tuple(ACTIVATIONS),  # what "auto" takes where the memory allows it
    )


def diffusers(a):
    """Return the same of diffusers' EasyAnimateTransformer3DModel."""
    import torch
    from diffusers import EasyAnimateTransformer3DModel

    baseline = resident()
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), getattr(torch, a.dtype)
    torch.manual_seed(0)
    with device:
        model = EasyAnimateTransformer3DModel(
            num_attention_heads=a.width // HEAD,
            attention_head_dim=HEAD,
            in_channels=16,
            out_channels=16,
            patch_size=2,
            num_layers=a.depth,
            mmdit_layers=a.depth,
            text_embed_dim=TEXTS[77],
            text_embed_dim_t5=TEXTS[256],
        )
        if a.task == "forward":
            model = model.to(dtype)
        texts = [torch.randn(1, n, w) for n, w in TEXTS.items()]
        time = torch.tensor([500.0])
    if a.side == "compiled":
        for block in model.transformer_blocks:  # one compilation serves all blocks
            block.compile(dynamic=False)

    def predict(x, *texts):
        return model(x, time, encoder_hidden_states=texts[0], encoder_hidden_states_t5=texts[1])[0]

    if a.task == "step":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)

    def run_of(frames, rows, columns):
        latents = torch.randn(1, 16, frames, 2 * rows, 2 * columns, device=device)

        @torch.no_grad()
        def forward():
            predict(latents.to(dtype), *(text.to(dtype) for text in texts))

        def step():
            with torch.autocast(device.type, dtype, enabled=a.dtype != "float32"):
                out = predict(latents, *texts)
            torch.nn.functional.mse_loss(out.float(), latents).backward()
            optimizer.step()
            optimizer.zero_grad()

        return waited(torch, forward if a.task == "forward" else step)

    def peak():
        return torch.cuda.max_memory_allocated() if cuda else high_water() - baseline

    name = torch.cuda.get_device_name() if cuda else "cpu"
    return run_of, peak, f"{name}, torch {torch.__version__}"


def waited(torch, function):
    """Return a function that calls `function` and waits for the device."""

    def run():
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def limits(a):
    """Return the same of JAX's FLOP/s: up-projection, its weights' gradient, attention."""
    import jax
    import jax.numpy as jnp

    from easyanimate_jax.models.attention import attention

    def both(q, k, v, lengths, dy):
        return jax.vjp(lambda *x: attention(*x, lengths), q, k, v)[1](dy)

    def timed(function, *operands):
        program = jax.jit(function)
        return lambda: jax.block_until_ready([program(*operands) for _ in range(QUEUED)])

    def run_of(*grid):
        S, D = math.prod(grid) + sum(TEXTS), a.width
        shapes = (S, D), (D, 4 * D), (S, 4 * D), (1, S, D // HEAD, HEAD)
        key = jax.random.key(0)
        x, w, dy, q = (jax.random.normal(key, shape, a.dtype) for shape in shapes)
        lengths = jnp.array([S])
        work = {
            "matmul": timed(jnp.dot, x, w),
            "gradient": timed(lambda x, dy: x.T @ dy, x, dy),
            "attention": timed(attention, q, q, q, lengths),
            "both": timed(both, q, q, q, lengths, q),
        }
        return rates(work, S, D)

    return (
        run_of,
        jax_peak(jax, resident()),
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
    )


def torch_limits(a):
    """Return the same of torch's FLOP/s, with the attention that diffusers uses."""
    import torch

    cuda, dtype = torch.cuda.is_available(), getattr(torch, a.dtype)
    device = torch.device("cuda" if cuda else "cpu")
    attention = torch.nn.functional.scaled_dot_product_attention

    def run_of(*grid):
        S, D = math.prod(grid) + sum(TEXTS), a.width
        shapes = (S, D), (D, 4 * D), (S, 4 * D), (1, D // HEAD, S, HEAD)
        x, w, dy, q = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
        learnt = [q.clone().requires_grad_() for _ in range(3)]
        work = {
            "matmul": lambda: x @ w,
            "gradient": lambda: x.T @ dy,
            "attention": lambda: attention(q, q, q),
            "both": lambda: torch.autograd.grad(attention(*learnt), learnt, q),
        }
        queued = {
            name: waited(torch, lambda f=function: [f() for _ in range(QUEUED)])
            for name, function in work.items()
        }
        return rates(queued, S, D)

    name = torch.cuda.get_device_name() if cuda else "cpu"
    return run_of, lambda: 0, f"{name}, torch {torch.__version__}"


def rates(work: dict, S: int, D: int):
    """Return a function that gives the best FLOP/s so far of each kind of work.

    Attention's backward pass counts as 2.5 times its forward pass.
    """
    flops = {"matmul": 2 * S * D * 4 * D, "attention": 4 * S * S * D}
    flops |= {"gradient": flops["matmul"], "both": 3.5 * flops["attention"]}

    best = dict.fromkeys(work, 0.0)

    def run():
        for name, function in work.items():
            began = time.perf_counter()
            function()
            seconds = (time.perf_counter() - began) / QUEUED
            best[name] = max(best[name], flops[name] / seconds)
        return best

    return run


def planned(program) -> int:
    """Return the bytes that the compiled program's arguments, results and temporaries need."""
    m = program.memory_analysis()
    sizes = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return sizes - m.alias_size_in_bytes


def jax_peak(jax, baseline: int):
    """Return the device's own peak if it has a counter, else the growth of the process."""
    device = jax.devices()[0]
    if device.memory_stats():
        return lambda: device.memory_stats()["peak_bytes_in_use"]
    return lambda: high_water() - baseline


def resident() -> int:
    """Return the bytes resident in this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Forget the peak of compilation, in the process and in torch's allocator."""
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def high_water() -> int:
    """Return the peak of the bytes resident in this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
