import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easyanimate_jax.data.loader import Batch
from easyanimate_jax.diffusion.ddpm import DDPM
from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.runs.batches import place
from easyanimate_jax.sharding import MeshConfig, make_mesh, shardings
from easyanimate_jax.training.checkpoint import Checkpoints
from easyanimate_jax.training.optimizer import OptimizerConfig, make_optimizer
from easyanimate_jax.training.step import (
    Networks,
    denoising_loss,
    init_state,
    train_step,
    widen_state,
)

TINY = MMDiTConfig(
    depth=2,
    mmdit_depth=1,
    heads=2,
    head_width=16,
    text_widths=(8, 12),
    text_norm=False,
    round_time=False,
    time_width=16,
    dtype="float32",
)
# A large eps: Adam turns rounding of near-zero gradients into whole updates.
OPTIMIZER = make_optimizer(OptimizerConfig(max_grad_norm=1.0, eps=1e-3))
MUON = make_optimizer(OptimizerConfig("muon", max_grad_norm=1.0, eps=1e-3))
ONE = MeshConfig(1, 1, 1, 1)


def make_batch(num_micro: int, rows: int, lengths=(24, 18), channels: int = 16) -> Batch:
    rng = np.random.RandomState(0)
    total, N = num_micro * rows, 24
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    count = np.resize(lengths, total).astype(np.int32)
    grid = np.stack([count // 6, np.full(total, 2), np.full(total, 3)], 1).astype(np.int32)
    flat = Batch(
        mean=draw(total, N, 64),
        logvar=draw(total, N, 64) - 4,
        grid=grid,
        lengths=count,
        texts=(draw(total, 4, 8), draw(total, 3, 12)),
        condition=draw(total, N, 4 * (channels - 16)) if channels > 16 else None,
        weight=np.ones(total, np.float32),
    )
    return jax.tree.map(lambda x: x.reshape(num_micro, rows, *x.shape[1:]), flat)


def regroup(batch: Batch, num_micro: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(num_micro, -1, *x.shape[2:]), batch)


@functools.cache
def start(optimizer):
    return jax.jit(_start, static_argnums=0)(optimizer)


def _start(optimizer):
    state = init_state(lambda k: MMDiT(TINY, rngs=nnx.Rngs(params=k)), optimizer, jax.random.key(0))
    # A zero output layer would hide the blocks from the first gradient.
    kernel = state.model.output.linear.kernel
    kernel.set_value(0.1 * jax.random.normal(jax.random.key(1), kernel.get_value().shape))
    return state


def steps(mesh_config: MeshConfig, batch: Batch, count: int = 2, num_devices: int = 1, **settings):
    """The state and losses after `count` steps on a mesh."""
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    settings = {"optimizer": OPTIMIZER, "process": DDPM(), "ema_decay": 0.9} | settings
    program, placed = compiled(mesh, **settings)
    with jax.set_mesh(mesh):
        before = program._cache_size()
        state = jax.device_put(start(settings["optimizer"]), placed)
        losses = []
        for _ in range(count):
            state, metrics = program(
                state, place(batch, mesh), jax.random.key(7), jnp.float32(1e-2)
            )
            losses.append(float(metrics["loss"]))
        assert program._cache_size() <= before + 1
    return jax.device_get(state), losses


@functools.cache
def compiled(mesh, **settings):
    """The jitted step on a mesh, and where its state is; batches of one shape share a program."""
    placed = shardings(mesh, start(settings["optimizer"]))
    return jax.jit(lambda *a: train_step(*a, **settings), out_shardings=(placed, None)), placed


def assert_same_weights(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a.model, b.model)


@pytest.fixture(scope="module")
def one_device():
    return steps(ONE, make_batch(1, 8))


@pytest.mark.slow  # the next test accumulates too
def test_a_batch_may_be_accumulated(one_device):
    state, losses = steps(ONE, regroup(make_batch(1, 8), 4))
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    assert_same_weights(state, one_device[0], atol=2e-5)


def test_rows_of_weight_zero_change_nothing(one_device):
    padded = jax.tree.map(lambda x: np.concatenate([x, x[:, :2]], axis=1), make_batch(1, 8))
    padded.weight[:, 8:] = 0
    state, losses = steps(ONE, regroup(padded, 2))
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-5)
    assert_same_weights(state, one_device[0], atol=2e-5)


@pytest.mark.slow
def test_rows_that_fill_up_take_no_share_of_the_times():
    padded = jax.tree.map(lambda x: np.concatenate([x, x[:, :2]], axis=1), make_batch(1, 8))
    padded.weight[:, 8:] = 0
    settings = {"process": DDPM(stratified=True), "batch_size": 8}
    state, losses = steps(ONE, padded, **settings)
    expected, expected_losses = steps(ONE, make_batch(1, 8), **settings)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_same_weights(state, expected, atol=2e-5)


# With 8 rows every device has its own; with 4 the devices along `context` share samples.
@pytest.mark.parametrize(
    ("mesh", "num_micro"),
    [
        pytest.param((1, 2, 2, 2), 4, marks=pytest.mark.slow),
        ((2, 2, 2, 1), 2),
        pytest.param((1, 8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 2, 2, 2), 1, marks=pytest.mark.slow),
        pytest.param((1, 1, 8, 1), 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_eight_devices_train_like_one(one_device, mesh, num_micro):
    state, losses = steps(MeshConfig(*mesh), regroup(make_batch(1, 8), num_micro), num_devices=8)
    np.testing.assert_allclose(losses, one_device[1], rtol=1e-4)
    assert_same_weights(state, one_device[0], atol=1e-4)
    # Adam's first moment is a sum of the gradients of both steps.
    got, want = (jax.tree.leaves(s.opt_state[1].mu) for s in (state, one_device[0]))
    largest = max(np.abs(x).max() for x in want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * largest, rtol=0)


@pytest.mark.slow
def test_eight_devices_train_with_muon_like_one():
    batch = make_batch(1, 8)
    state, losses = steps(MeshConfig(1, 2, 2, 2), batch, num_devices=8, optimizer=MUON)
    expected, expected_losses = steps(ONE, batch, optimizer=MUON)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    assert_same_weights(state, expected, atol=1e-4)


def test_padding_past_a_length_is_not_seen(one_device):
    batch = make_batch(1, 8)
    past = np.arange(24)[None, None, :, None] >= batch.lengths[..., None, None]
    batch = batch._replace(mean=np.where(past, 1e3, batch.mean).astype(np.float32))
    np.testing.assert_allclose(steps(ONE, batch)[1], one_device[1], rtol=1e-5)


@pytest.mark.parametrize("value, where", [(np.nan, (0, 3, 5, 7)), (1e6, ...)])
def test_a_batch_that_is_not_finite_or_all_outliers_changes_no_weight(value, where):
    batch = make_batch(1, 8)
    batch.mean[where] = value
    state, _ = steps(ONE, batch, count=1)
    jax.tree.map(np.testing.assert_array_equal, state.model, start(OPTIMIZER).model)
    assert (int(state.step), int(state.skipped)) == (1, 1)


class Unnoised:
    """A process of which the model sees the latents themselves, and is to predict zeros."""

    def sample_time(self, key, shape, tokens=None):
        return jnp.ones(shape)

    def add_noise(self, clean, noise, time):
        return clean

    def target(self, clean, noise, time):
        return jnp.zeros_like(clean)

    def weight(self, time):
        return jnp.ones_like(time)


class Gain(MMDiT):
    """A model of one weight, which its tokens are multiplied by."""

    def __init__(self, gain: float):
        self.gain = nnx.Param(jnp.float32(gain))

    def __call__(self, tokens, *_):
        return self.gain[...] * tokens


def test_latents_have_the_deviation_of_their_posterior():
    batch = jax.tree.map(lambda x: x[0], make_batch(1, 4, lengths=(24,)))
    batch = batch._replace(mean=0 * batch.mean, logvar=0 * batch.logvar + np.float32(np.log(0.04)))
    batch = jax.tree.map(jnp.asarray, batch)
    drawn = jnp.arange(4), jax.random.key(0)
    loss, _ = denoising_loss(Networks(Gain(1)), batch, jnp.ones(4), *drawn, process=Unnoised())
    assert abs(loss / 4 - 0.04) < 0.003  # the mean of 6,144 squares


def test_the_average_follows_the_weights_after_the_update():
    state = init_state(lambda _: Gain(1), optax.identity(), jax.random.key(0))
    state = state._replace(ema=Gain(0))
    settings = {"optimizer": optax.identity(), "process": Unnoised(), "ema_decay": 0.9}
    batch = jax.tree.map(jnp.asarray, make_batch(1, 4))
    state, _ = train_step(state, batch, jax.random.key(7), jnp.float32(0.1), **settings)
    (gain,), (average,) = (jax.tree.leaves(model) for model in (state.model, state.ema))
    assert abs(gain - 1) > 0.1
    np.testing.assert_allclose(average, 0.9 * gain, rtol=1e-6)  # the first step's decay is 1 / 10


def test_a_widened_state_goes_on_with_zero_weights_for_the_new_channels(one_device):
    state = widen_state(one_device[0], 33)
    assert {m.config.in_channels for m in (state.model, state.ema, state.opt_state[1].mu)} == {33}
    assert not np.any(state.model.patches.kernel.get_value()[64:])
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        _, metrics = jax.jit(
            lambda *a: train_step(*a, optimizer=OPTIMIZER, process=DDPM(), ema_decay=0.9)
        )(state, make_batch(1, 8, channels=33), jax.random.key(7), jnp.float32(1e-2))
    assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_a_widened_state_goes_on_with_muon():
    state = widen_state(start(MUON), 33)
    batch, key = make_batch(1, 8, channels=33), jax.random.key(7)
    with jax.set_mesh(make_mesh(ONE, jax.devices()[:1])):
        later, _ = jax.jit(
            lambda *a: train_step(*a, optimizer=MUON, process=DDPM(), ema_decay=0.9)
        )(state, batch, key, jnp.float32(1e-2))
    assert jax.tree.structure(later) == jax.tree.structure(state)
    assert np.any(later.model.patches.kernel.get_value()[64:])


@pytest.mark.slow
def test_a_state_of_muon_comes_back_from_a_checkpoint(tmp_path):
    state = jax.tree.map(jnp.asarray, steps(ONE, make_batch(1, 8), optimizer=MUON)[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(2, state, {"step": 2})
    checkpoints.settle()
    _, restored, _ = checkpoints.restore(lambda meta: like)
    checkpoints.close(2)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    moments = restored.opt_state[1].inner_states["muon"].inner_state[0].mu
    assert np.any(moments.blocks[0].video.mlp.up.kernel.get_value())


def test_halves_give_the_loss_of_the_same_floats():
    batch = jax.tree.map(lambda x: x[0], make_batch(1, 8))
    halve = lambda x: x.astype(np.float16)  # noqa: E731
    halves = batch._replace(
        mean=halve(batch.mean),
        logvar=halve(batch.logvar),
        texts=tuple(halve(text) for text in batch.texts),
    )
    floats = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, halves)
    time, rows, model = jnp.arange(0, 800, 100), jnp.arange(8), start(OPTIMIZER).model
    loss = jax.jit(
        lambda batch: denoising_loss(
            Networks(model),
            batch,
            time.astype(jnp.float32),
            rows,
            jax.random.key(3),
            process=DDPM(),
        )[0]
    )
    np.testing.assert_array_equal(loss(halves), loss(floats))
