"""Run one transformer and one task in this process; print seconds and peak memory as lines of JSON.

`cpu.py` and `gpu.py` start it. Sides: `ours`; `masked`, ours with a mask in cuDNN's attention
instead of zero keys; `fp8`, ours with 8-bit products; `diffusers`; and `compiled`, which is
diffusers' model with each block under torch.compile.

Tasks: `forward`; `step` (loss, gradient and AdamW); `lora`, the step of adapters of rank 128;
`limits`, which measures the framework's own FLOP/s of a matrix product and of attention in these
shapes; `same`, which compares our attention with and without a mask to that in float32. It prints
one line per grid, the shortest first, because JAX reports the peak of the process. The field
`extra` holds the rates of `limits`, the errors of `same`, or the bytes that our compiled program
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
    p.add_argument("side", choices=("ours", "masked", "fp8", "diffusers", "compiled"))
    p.add_argument("task", choices=("forward", "step", "lora", "limits", "same"))
    for name in ("width", "depth", "repeats"):
        p.add_argument(f"--{name}", type=int, required=True)
    p.add_argument("--grids", type=grid_of, nargs="+", required=True, help="such as 13x32x32")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    a = p.parse_args()
    torch = a.side in ("diffusers", "compiled")
    if a.side == "masked":
        hide_padding()
    make = {"limits": torch_limits if torch else limits, "same": same}.get(a.task)
    run_of, peak, device = (make or (diffusers if torch else ours))(a)
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

    from easyanimate_jax.models.lora import LoRAConfig, attach, is_adapter
    from easyanimate_jax.models.mmdit import MMDiT
    from easyanimate_jax.training.step import whole

    baseline, config = resident(), our_config(a)
    held = "float32" if a.task == "step" else a.dtype

    def build(key):
        model = MMDiT(config, rngs=nnx.Rngs(params=key))
        model = jax.tree.map(lambda x: x.astype(held), model)
        if a.task == "lora":
            attach(model, LoRAConfig(rank=128), key=key)
        return model

    optimizer = optax.adamw(1e-4)
    trained, graph, frozen = jax.jit(build)(jax.random.key(0)), None, None
    if a.task == "lora":
        graph, trained, frozen = nnx.split(trained, is_adapter, ...)

    def predict(trained, frozen, inputs):
        return whole(graph, trained, frozen)(*inputs)

    def loss(trained, frozen, inputs):
        return jnp.mean((predict(trained, frozen, inputs).astype(jnp.float32) - inputs[0]) ** 2)

    def step(trained, state, frozen, inputs):
        gradient = jax.grad(loss)(trained, frozen, inputs)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    kept = [trained]
    if a.task != "forward":
        kept.append(jax.jit(optimizer.init)(trained))

    def run_of(*grid):
        N = math.prod(grid)
        tokens = jax.random.normal(jax.random.key(1), (1, N, 64))
        texts = tuple(jax.random.normal(jax.random.key(n), (1, n, w)) for n, w in TEXTS.items())
        inputs = tokens, jnp.array([grid]), jnp.array([N]), jnp.array([500.0]), texts
        if a.task == "forward":
            program = jax.jit(predict).lower(*kept, frozen, inputs).compile()
        else:
            program = jax.jit(step, donate_argnums=(0, 1)).lower(*kept, frozen, inputs).compile()

        def run():
            out = jax.block_until_ready(program(*kept, frozen, inputs))
            if a.task != "forward":
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
        products="fp8" if a.side == "fp8" else "full",
        save=tuple(ACTIVATIONS),  # what "auto" takes where the memory allows it
    )


def hide_padding() -> None:
    """Let cuDNN's attention hide padding with a mask for heads of every width."""
    from easyanimate_jax.models import attention

    attention.UNMASKED = ()


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
    """Return the same of JAX's FLOP/s: up-projection, its weights' gradient, attention.

    The side `masked` has only the attention, because its products are those of `ours`.
    """
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
        products = {
            "matmul": timed(jnp.dot, x, w),
            "gradient": timed(lambda x, dy: x.T @ dy, x, dy),
        }
        work = {
            "attention": timed(attention, q, q, q, lengths),
            "both": timed(both, q, q, q, lengths, q),
        }
        return rates(work if a.side == "masked" else products | work, S, D)

    return (
        run_of,
        jax_peak(jax, resident()),
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
    )


def same(a):
    """Return the same of the errors of our attention, with and without a mask.

    Errors are relative norms, of the result and of the gradients of queries, keys and values. Two
    rows of 8 heads are compared, and a third of the second row is padding. Queries and keys are as
    long as QK-norm leaves them, and the keys have a common part.
    """
    import jax
    import jax.numpy as jnp

    from easyanimate_jax.models import attention as adapter

    def all_of(attend, q, k, v, d_out, lengths):
        out, pull = jax.vjp(lambda *x: attend(*x, lengths), q, k, v)
        return out, *pull(d_out)

    def run_of(*grid):
        S = math.prod(grid) + sum(TEXTS)
        lengths = jnp.array([S, 2 * S // 3])
        keys = jax.random.split(jax.random.key(0), 5)
        q, k, v, d_out = (jax.random.normal(key, (2, S, 8, HEAD)) for key in keys[:4])
        k = k + 0.5 * jax.random.normal(keys[4], (2, 1, 8, HEAD))
        q, k = (8 * x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        real = (jnp.arange(S)[None] < lengths[:, None])[..., None, None]
        d_out = jnp.where(real, d_out, 0)  # padding is in no loss
        arrays = [x.astype(a.dtype) for x in (q, k, v, d_out)]
        with jax.default_matmul_precision("highest"):
            exact = [x.astype(jnp.float32) for x in arrays]
            want = jax.jit(all_of, static_argnums=0)(adapter.sliced, *exact, lengths)

        def errors(found):
            pairs = [(x * real, y * real) for x, y in zip(found, want, strict=True)]
            return [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs]

        def run():
            found, widths = {}, adapter.UNMASKED
            for name, of_cudnn in (("zero keys", widths), ("mask", ())):
                adapter.UNMASKED = of_cudnn
                attend = jax.jit(lambda *x: all_of(adapter.attention, *x))
                found[name] = errors(attend(*arrays, lengths))
            adapter.UNMASKED = widths
            return found

        return run

    return run_of, lambda: 0, f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


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
