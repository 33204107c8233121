"""One transformer, one task, in a process of its own: seconds and peak memory, as JSON.

`cpu.py` and `gpu.py` start it. Sides: `ours`, `diffusers`, and `compiled`, which is diffusers'
under torch.compile. Tasks: `forward`, and `step`: loss, gradient and AdamW. With the task `limits`
it measures what the side's framework reaches with a matrix product and with attention of these
shapes. Beside them `extra`: those rates, or the bytes that our compiled program plans with.
"""

import argparse
import ctypes
import json
import resource
import sys
import time
from pathlib import Path

TEXTS = {77: 1024, 256: 2048}  # V5's tokens of a prompt, and widths of their states
HEAD = 64


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("side", choices=("ours", "diffusers", "compiled"))
    p.add_argument("task", choices=("forward", "step", "limits"))
    for name in ("width", "depth", "frames", "rows", "columns", "repeats"):  # of tokens
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    a = p.parse_args()
    make = ours if a.side == "ours" else diffusers
    if a.task == "limits":
        make = limits if a.side == "ours" else torch_limits
    run, peak, device = make(a)
    run()  # compiles
    reset_peak()
    seconds = []
    for _ in range(a.repeats):
        began = time.perf_counter()
        extra = run()
        seconds.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "peak": peak(), "device": device, "extra": extra}))


def ours(a):
    """(the task as a function, its peak bytes as one, the device's name)."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from easyanimate_jax.models.mmdit import ACTIVATIONS, MMDiT, MMDiTConfig

    baseline = resident()
    config = MMDiTConfig(
        depth=a.depth,
        mmdit_depth=a.depth,
        heads=a.width // HEAD,
        head_width=HEAD,
        text_widths=tuple(TEXTS.values()),
        text_norm=False,
        round_time=False,
        dtype=a.dtype,
        save=tuple(name for name in ACTIVATIONS if name != "qkv"),  # as configs/v5_12b.py
    )
    held = a.dtype if a.task == "forward" else "float32"

    def build(key):
        model = MMDiT(config, rngs=nnx.Rngs(params=key))
        return jax.tree.map(lambda x: x.astype(held), model)

    model = jax.jit(build)(jax.random.key(0))
    N = a.frames * a.rows * a.columns
    tokens = jax.random.normal(jax.random.key(1), (1, N, 64))
    texts = tuple(jax.random.normal(jax.random.key(n), (1, n, w)) for n, w in TEXTS.items())
    grid, lengths = jnp.array([[a.frames, a.rows, a.columns]]), jnp.array([N])
    inputs = tokens, grid, lengths, jnp.array([500.0]), texts
    optimizer = optax.adamw(1e-4)

    def loss(model):
        return jnp.mean((model(*inputs).astype(jnp.float32) - tokens) ** 2)

    def step(model, state):
        gradient = jax.grad(loss)(model)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state

    if a.task == "forward":
        program = jax.jit(lambda model: model(*inputs)).lower(model).compile()

        def run():
            jax.block_until_ready(program(model))
            return planned(program)
    else:
        kept = [model, jax.jit(optimizer.init)(model)]
        program = jax.jit(step, donate_argnums=(0, 1)).lower(*kept).compile()
        del model

        def run():
            kept[:] = jax.block_until_ready(program(*kept))
            return planned(program)

    return run, jax_peak(jax, baseline), jax.devices()[0].device_kind


def diffusers(a):
    """The same of diffusers' EasyAnimateTransformer3DModel."""
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
        latents = torch.randn(1, 16, a.frames, 2 * a.rows, 2 * a.columns)
        texts = [torch.randn(1, n, w) for n, w in TEXTS.items()]
        time = torch.tensor([500.0])
    if a.side == "compiled":
        model = torch.compile(model)

    def predict(x, *texts):
        return model(x, time, encoder_hidden_states=texts[0], encoder_hidden_states_t5=texts[1])[0]

    def wait():
        if cuda:
            torch.cuda.synchronize()

    if a.task == "forward":

        @torch.no_grad()
        def run():
            predict(latents.to(dtype), *(text.to(dtype) for text in texts))
            wait()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run():
            with torch.autocast(device.type, dtype, enabled=a.dtype != "float32"):
                out = predict(latents, *texts)
            torch.nn.functional.mse_loss(out.float(), latents).backward()
            optimizer.step()
            optimizer.zero_grad()
            wait()

    def peak():
        return torch.cuda.max_memory_allocated() if cuda else high_water() - baseline

    return run, peak, torch.cuda.get_device_name() if cuda else "cpu"


def limits(a):
    """FLOP/s at these shapes: of the up-projection, its weights' gradient, attention."""
    import jax
    import jax.numpy as jnp

    from easyanimate_jax.models.attention import attention

    S, D = sequence(a), a.width
    x, w, dy = (jnp.ones(shape, a.dtype) for shape in ((S, D), (D, 4 * D), (S, 4 * D)))
    q = jax.random.normal(jax.random.key(0), (1, S, D // HEAD, HEAD), a.dtype)
    lengths = jnp.array([S])

    def both(q, k, v, dy):
        return jax.vjp(lambda *x: attention(*x, lengths), q, k, v)[1](dy)

    def timed(function, *operands):
        program = jax.jit(function)
        return lambda: jax.block_until_ready(program(*operands))

    work = {
        "matmul": timed(jnp.dot, x, w),
        "gradient": timed(lambda x, dy: x.T @ dy, x, dy),
        "attention": timed(attention, q, q, q, lengths),
        "both": timed(both, q, q, q, q),
    }
    return rates(work, S, D), jax_peak(jax, resident()), jax.devices()[0].device_kind


def torch_limits(a):
    """The same of torch, whose attention is that of diffusers."""
    import torch

    cuda, dtype = torch.cuda.is_available(), getattr(torch, a.dtype)
    device, S, D = torch.device("cuda" if cuda else "cpu"), sequence(a), a.width
    attention = torch.nn.functional.scaled_dot_product_attention
    shapes = (S, D), (D, 4 * D), (S, 4 * D)
    x, w, dy = (torch.ones(shape, dtype=dtype, device=device) for shape in shapes)
    q = torch.randn((1, D // HEAD, S, HEAD), dtype=dtype, device=device)
    learnt = [q.clone().requires_grad_() for _ in range(3)]

    def timed(function):
        def run():
            function()
            if cuda:
                torch.cuda.synchronize()

        return run

    work = {
        "matmul": timed(lambda: x @ w),
        "gradient": timed(lambda: x.T @ dy),
        "attention": timed(lambda: attention(q, q, q)),
        "both": timed(lambda: torch.autograd.grad(attention(*learnt), learnt, q)),
    }
    return rates(work, S, D), lambda: 0, torch.cuda.get_device_name() if cuda else "cpu"


def sequence(a) -> int:
    return a.frames * a.rows * a.columns + sum(TEXTS)


def rates(work: dict, S: int, D: int):
    """A function that gives the best FLOP/s so far of each kind of work.

    Attention's backward pass counts as two and a half times its forward pass.
    """
    flops = {"matmul": 2 * S * D * 4 * D, "attention": 4 * S * S * D}
    flops |= {"gradient": flops["matmul"], "both": 3.5 * flops["attention"]}

    best = dict.fromkeys(work, 0.0)

    def run():
        for name, function in work.items():
            began = time.perf_counter()
            function()
            best[name] = max(best[name], flops[name] / (time.perf_counter() - began))
        return best

    return run


def planned(program) -> int:
    """Bytes that the compiled program's arguments, results and temporaries take together."""
    m = program.memory_analysis()
    sizes = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return sizes - m.alias_size_in_bytes


def jax_peak(jax, baseline: int):
    """The device's own count where it keeps one, else what the process grew by."""
    device = jax.devices()[0]
    if device.memory_stats():
        return lambda: device.memory_stats()["peak_bytes_in_use"]
    return lambda: high_water() - baseline


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Forget what compiling took: of the process, and of torch's allocator."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def high_water() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
