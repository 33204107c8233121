"""Products in 8 bits: their integers, errors, rounding and gradients, and a model that has them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from arrays import flat_weights
from fakes import some_texts
from flax import nnx
from test_step import TINY as TWO_BLOCKS

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.diffusion.flow import Flow
from easyanimate_jax.generation.denoising import Sampling
from easyanimate_jax.generation.pipelines import LatentDiffusion, Request, denoise_latents
from easyanimate_jax.models.layers import axes, linear, linears
from easyanimate_jax.models.lora import LoRAConfig, attach, is_adapter
from easyanimate_jax.models.mmdit import MMDiT
from easyanimate_jax.models.products import DOT_GENERAL, product, quantized, thresholds
from easyanimate_jax.models.storage import store
from easyanimate_jax.sharding import MeshConfig, batch_sharding, make_mesh, shardings
from easyanimate_jax.training.optimizer import OptimizerConfig, make_optimizer
from easyanimate_jax.training.step import init_state, train_step

TINY = dataclasses.replace(TWO_BLOCKS, depth=1)
LOW = ("int8", "fp8")
MOST = {np.int8: 127, ml_dtypes.float8_e4m3fn: 448, ml_dtypes.float8_e5m2: 57344}
TYPES = {  # of x and kernel, and of the gradient
    "int8": (np.int8, np.int8),
    "fp8": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, KERNEL, DY = normal(0, 40, 24), normal(1, 24, 32), normal(2, 40, 32)


def largest(x, axis):
    return np.abs(x).max(axis=axis, keepdims=True)


def to_8_bits(x, axis, dtype, up=None):
    """(values as float64, scale), in NumPy."""
    most = np.float32(MOST[dtype])
    scaled = x * (most / largest(x, axis))
    if dtype == np.int8:
        scaled = np.rint(scaled) if up is None else np.clip(np.floor(scaled + up), -127, 127)
    return scaled.astype(dtype).astype(np.float64), (largest(x, axis) / most).astype(np.float64)


def hashed(x):
    """MurmurHash3's finalizer of each value's bits and place, as a number of [0, 1)."""
    row, column = np.indices(x.shape, np.uint32)
    bits = x.view(np.uint32) + row * np.uint32(0x9E3779B1) + column * np.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return (bits >> 16).astype(np.float32) / 2**16


@functools.partial(jax.jit, static_argnums=0)
def passes(kind, x, kernel, dy):
    """y, dx and dkernel."""
    y, back = jax.vjp(functools.partial(product, kind), x, kernel)
    return y, *back(dy)


@pytest.mark.parametrize("kind", LOW)
def test_the_three_products_are_those_of_numpy(kind):
    forward, gradient = TYPES[kind]
    up = hashed(DY) if kind == "int8" else None
    (x, a), (kernel, b) = to_8_bits(X, 1, forward), to_8_bits(KERNEL, 0, forward)
    y = (x @ kernel) * a * b
    (dy, a), (kernel, b) = to_8_bits(DY, 1, gradient, up), to_8_bits(KERNEL, 1, forward)
    dx = (dy @ kernel.T) * a * b.T
    (x, a), (dy, b) = to_8_bits(X, 0, forward), to_8_bits(DY, 0, gradient, up)
    dkernel = (x.T @ dy) * a.T * b
    for found, wanted in zip(passes(kind, X, KERNEL, DY), (y, dx, dkernel), strict=True):
        # Sums of integers are exact; two multiplications by a scale are rounded.
        tolerance = {"rtol": 3e-7} if kind == "int8" else {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(found, wanted, **tolerance)


def step_of(x, axis, dtype, stochastic):
    """The largest error of each value when it becomes 8-bit."""
    if dtype == np.int8:
        return largest(x, axis) / 127 * (1 if stochastic else 0.5) * np.ones_like(x)
    relative, least = (2**-4, 2**-10) if dtype == ml_dtypes.float8_e4m3fn else (2**-3, 2**-17)
    return np.maximum(np.abs(x) * relative, largest(x, axis) / MOST[dtype] * least)


@pytest.mark.parametrize("kind", LOW)
def test_errors_are_within_the_bound_of_the_rounding(kind):
    forward, gradient = TYPES[kind]

    def bound(a, axis_a, type_a, b, axis_b, type_b):
        ea, eb = (
            step_of(x, axis, dtype, dtype is gradient and x is DY)
            for x, axis, dtype in ((a, axis_a, type_a), (b, axis_b, type_b))
        )
        a, b, ea, eb = (
            np.moveaxis(x, axis, -1)
            for x, axis in ((np.abs(a), axis_a), (np.abs(b), axis_b), (ea, axis_a), (eb, axis_b))
        )
        return a @ eb.T + ea @ b.T + ea @ eb.T

    exact = X @ KERNEL, DY @ KERNEL.T, X.T @ DY
    bounds = (
        bound(X, 1, forward, KERNEL, 0, forward),
        bound(DY, 1, gradient, KERNEL, 1, forward),
        bound(X, 0, forward, DY, 0, gradient),
    )
    usual = {"int8": (0.011, 0.014, 0.014), "fp8": (0.04, 0.06, 0.06)}[kind]
    for found, wanted, most, near in zip(
        passes(kind, X, KERNEL, DY), exact, bounds, usual, strict=True
    ):
        error = np.abs(found - wanted)
        assert np.all(error <= most * (1 + 1e-4))
        assert 0 < np.linalg.norm(error) < near * np.linalg.norm(wanted)


def test_stochastic_rounding_is_right_on_average():
    """Equal values too: the nearest integer would make each of them 38 / 127 of the largest."""
    x = np.full((4000, 8), 0.3, np.float32)
    x[:, 0] = 1
    values, scale = map(
        np.asarray, quantized(jnp.asarray(x), 1, jnp.int8, thresholds(jnp.asarray(x)))
    )
    assert np.all(values[:, 0] == 127) and set(np.unique(values[:, 1:])) == {38, 39}
    means = (values * scale)[:, 1:].mean(axis=0)
    np.testing.assert_allclose(means, 0.3, atol=4 * 0.5 / 127 / 4000**0.5)

    x = normal(3, 100_000, 1)
    values, scale = map(
        np.asarray, quantized(jnp.asarray(x), 0, jnp.int8, thresholds(jnp.asarray(x)))
    )
    fraction = x / scale - np.floor(x / scale)
    rose = values > np.floor(x / scale)
    for low in np.arange(0, 1, 0.1):  # ten classes of fractions
        chosen = (fraction >= low) & (fraction < low + 0.1)
        expected, sigma = fraction[chosen].mean(), 0.5 / chosen.sum() ** 0.5
        assert abs(rose[chosen].mean() - expected) < 4 * sigma


def test_the_largest_value_does_not_leave_the_range_of_int8():
    for sign in (1, -1):
        up = jnp.full((2, 3), 0.5 + 0.501 * sign)  # a little outside of [0, 1)
        values, _ = quantized(sign * jnp.ones((2, 3)), 1, jnp.int8, up)
        assert set(np.unique(values)) == {sign * 127}


@pytest.mark.parametrize("kind", LOW)
def test_zeros_stay_zeros_and_other_rows_do_not_matter(kind):
    x, dy = X.copy(), DY.copy()
    x[5:], dy[5:] = 0, 0  # padding
    y, dx, dkernel = passes(kind, x, KERNEL, dy)
    assert not np.any(y[5:]) and not np.any(dx[5:])
    for few, many in zip(
        passes(kind, x[:5], KERNEL, dy[:5]), (y[:5], dx[:5], dkernel), strict=True
    ):
        np.testing.assert_array_equal(few, many)
    for found in passes(kind, 0 * x, 0 * KERNEL, 0 * dy):
        np.testing.assert_array_equal(found, np.zeros_like(found))
    for found in passes(kind, X, KERNEL, np.float32(1e-35) * DY):
        assert np.all(np.isfinite(found))


@pytest.mark.parametrize("kind", LOW)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_makes_its_row_and_its_gradient_so(kind, value):
    x, dy, kernel = X.copy(), DY.copy(), KERNEL.copy()
    x[3, 2] = dy[4, 7] = kernel[1, 6] = value
    y, dx, dkernel = passes(kind, x, KERNEL, dy)
    assert not np.any(np.isfinite(y[3])) and np.all(np.isfinite(np.delete(y, 3, axis=0)))
    assert not np.any(np.isfinite(dx[4])) and np.all(np.isfinite(np.delete(dx, 4, axis=0)))
    assert not np.any(np.isfinite(dkernel[2])) and not np.any(np.isfinite(dkernel[:, 7]))
    y, dx, _ = passes(kind, X, kernel, DY)
    assert not np.any(np.isfinite(y[:, 6])) and not np.any(np.isfinite(dx[:, 1]))


def test_a_sum_over_very_many_tokens_does_not_overflow():
    ones = jnp.ones((400_000, 1))
    np.testing.assert_allclose(passes("int8", ones, jnp.ones((1, 1)), ones)[2], 400_000, rtol=1e-6)


def layer(products, *, int8=False):
    built = linear(24, 32, ("embed", "mlp"), dtype="float32", rngs=nnx.Rngs(0), products=products)
    built.bias.set_value(jnp.asarray(normal(4, 32)))
    if int8:
        integers, scale = to_8_bits(KERNEL, 0, np.int8)
        built.kernel.set_value(jnp.asarray(integers, jnp.int8))
        built.scale = nnx.Param(jnp.asarray(scale[0], jnp.float32), **axes("mlp"))
    return built


def test_full_products_are_those_of_before():
    ours, x = layer("full"), jnp.asarray(normal(5, 2, 7, 24), jnp.float32)
    plain = nnx.Linear(24, 32, dtype="float32", rngs=nnx.Rngs(0))
    jaxprs = [str(jax.make_jaxpr(lambda x, f=f: f(x))(x)) for f in (ours, plain)]
    assert jaxprs[0] == jaxprs[1]
    stored = layer("full", int8=True)
    kernel, scale, bias = (
        w.get_value()[None, None] for w in (stored.kernel, stored.scale, stored.bias)
    )
    by_hand = x @ kernel[0, 0].astype(jnp.float32) * scale + bias
    np.testing.assert_array_equal(stored(x), by_hand)


def test_stored_integers_are_multiplied_as_they_are():
    stored, x = layer("int8", int8=True), jnp.asarray(X)
    kernel, scale = (np.float64(w.get_value()) for w in (stored.kernel, stored.scale))
    integers, row = to_8_bits(X, 1, np.int8)
    y, back = jax.vjp(lambda x: stored(x), x)
    wanted = integers @ kernel * row * scale[None] + normal(4, 32)[None]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
    dy = DY * np.float32(scale)[None]
    integers, row = to_8_bits(dy, 1, np.int8, hashed(dy))
    np.testing.assert_allclose(back(DY)[0], integers @ kernel.T * row, rtol=1e-5, atol=1e-6)


def test_an_adapter_beside_adds_its_own_product():
    base, x = layer("int8", int8=True), jnp.asarray(X)
    before, beside = base(x), layer("int8", int8=True)
    beside.adapter = lambda x: 2 * x[:, :1] * jnp.ones((1, 32))
    np.testing.assert_allclose(beside(x), before + 2 * x[:, :1], rtol=1e-6)


def config(products, **changes):
    return dataclasses.replace(TINY, products=products, **changes)


def random_model(config):
    shapes = jax.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.15 * rng.standard_normal(x.shape), x.dtype), shapes)


def is_low(name):
    return name.startswith("blocks.") and (".attention." in name or ".mlp." in name)


def test_only_the_dense_layers_of_the_blocks_have_them():
    for name, found in linears(jax.eval_shape(lambda: MMDiT(config("fp8"), rngs=nnx.Rngs(0)))):
        assert found.dot_general is DOT_GENERAL["fp8" if is_low(name) else "full"], name


ARGUMENTS = (
    normal(6, 4, 24, 64),
    np.array([[1, 5, 4], [2, 2, 4], [3, 2, 4], [1, 2, 2]], np.int32),
    np.array([20, 16, 24, 4], np.int32),
    np.array([0, 250, 500, 999], np.float32),
    (normal(7, 4, 5, 8), normal(8, 4, 7, 12)),
)


def loss(model, tokens, grid, lengths, time, texts):
    prediction = model(tokens, grid, lengths, time, texts)
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return jnp.mean(jnp.where(real[..., None], prediction, 0) ** 2)


def gradient(products, mesh):
    model = random_model(config(products))
    placed = shardings(mesh, model)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, placed))
        arguments = jax.device_put(ARGUMENTS, batch_sharding(mesh, 1))
        value, grads = step(jax.device_put(model, placed), *arguments)
    names = (*(f"{name}.kernel" for name, _ in linears(model) if is_low(name)),)
    return float(value), np.concatenate([flat_weights(grads)[name].ravel() for name in names])


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
def test_eight_devices_differentiate_like_one():
    """A device has scales of its own along the tokens, so gradients differ by their rounding."""
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    full, of_full = gradient("full", one)
    alone, of_one = gradient("int8", one)
    eight, of_eight = gradient("int8", make_mesh(MeshConfig(1, 2, 2, 2)))
    assert alone == pytest.approx(eight, rel=1e-4) and alone == pytest.approx(full, rel=1e-2)
    assert 0.002 < distance(of_one, of_full) < 0.05
    assert distance(of_eight, of_full) < 1.2 * distance(of_one, of_full)


@pytest.mark.parametrize("products", LOW)
def test_sampling_on_eight_devices_makes_what_one_makes(products):
    diffusion = LatentDiffusion(random_model(config(products)), None, Flow())
    request = Request(some_texts(2), some_texts(1), (5, 64, 64), [0, 1], Sampling(steps=2))
    sample = functools.partial(denoise_latents, diffusion, request)
    alone = sample()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))):
        np.testing.assert_allclose(sample(), alone, rtol=1e-3, atol=1e-3)


def test_adapters_are_trained_beside_integers_on_eight_devices():
    """Integers with products in float32, on one device, have almost the same gradients."""

    def gradients(products, mesh):
        model = random_model(config(products))
        store(model, "int8")
        attach(model, LoRAConfig(rank=2, targets=("attention",)), key=jax.random.key(0))
        graph, adapters, frozen = nnx.split(model, is_adapter, ...)
        with jax.set_mesh(mesh):
            of_loss = jax.grad(lambda weights, *xs: loss(nnx.merge(graph, weights, frozen), *xs))
            found = jax.jit(of_loss)(adapters, *ARGUMENTS)
            return [np.ravel(x) for x in jax.tree.leaves(found) if x.any()]

    one, eight = make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(1, 2, 2, 2))
    low, full = gradients("int8", eight), gradients("full", one)
    assert len(low) == len(full) == 6  # `up` of q, k, v and out; only k and v of the last text
    assert 1e-4 < distance(np.concatenate(low), np.concatenate(full)) < 0.1


BATCH = Batch(
    mean=normal(10, 1, 8, 24, 64),
    logvar=normal(11, 1, 8, 24, 64) - 4,
    grid=np.resize(np.array([[4, 2, 3], [3, 2, 3]], np.int32), (1, 8, 3)),
    lengths=np.resize(np.array([24, 18], np.int32), (1, 8)),
    texts=(normal(12, 1, 8, 4, 8), normal(13, 1, 8, 3, 12)),
    condition=None,
    weight=np.ones((1, 8), np.float32),
)


@functools.cache
def losses(products, count=30):
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=1.0, eps=1e-3))
    make = lambda key: MMDiT(config(products), rngs=nnx.Rngs(params=key))  # noqa: E731
    state = jax.jit(lambda: init_state(make, optimizer, jax.random.key(0)))()
    kernel = state.model.output.linear.kernel
    kernel.set_value(0.1 * jax.random.normal(jax.random.key(1), kernel.get_value().shape))
    step = jax.jit(
        functools.partial(train_step, optimizer=optimizer, process=DDPM(), ema_decay=0.9)
    )
    found = []
    for _ in range(count):
        state, metrics = step(state, BATCH, jax.random.key(7), jnp.float32(1e-2))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("products", LOW)
def test_thirty_updates_end_near_those_of_float32(products):
    full, low = losses("full"), losses(products)
    assert full[-1] < 0.9 * full[0] and low != full
    np.testing.assert_allclose(low[-5:], full[-5:], rtol=0.01)
