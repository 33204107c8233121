import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.training.optimizer import (
    OptimizerConfig,
    clip_abnormal,
    in_bfloat16,
    labels,
    make_optimizer,
    round_at_random,
    scale_rates,
)
from easyanimate_jax.weights.module import named_weights


def clipped_norm(norm: float, count: int) -> float:
    clip = clip_abnormal(0.05, 1000)
    state = clip.init(None)._replace(count=jnp.int32(count))
    grads, state = clip.update({"w": jnp.full(4, norm / 2)}, state)
    assert state.count == count + 1
    return float(optax.tree.norm(grads))


@pytest.mark.parametrize(
    "norm, count, expected",
    [
        (0.01, 0, 0.01),  # below the limit: untouched
        (10.0, 0, 0.25),  # the limit starts at five times the maximum,
        (10.0, 500, 0.15),  # falls linearly,
        (10.0, 1000, 0.05),  # and stays
        (0.2, 1001, 0.05),  # four times the limit is clipped to the limit,
        (0.3, 1001, 0.05 / 6),  # more than five times is abnormal and clipped harder,
        (10.0, 1001, 0.005),  # down to a tenth
    ],
)
def test_gradients_are_clipped_by_the_reference_rule(norm, count, expected):
    assert clipped_norm(norm, count) == pytest.approx(expected, rel=1e-3)


def test_an_update_is_torchs_adamw():
    import torch

    config = OptimizerConfig(max_grad_norm=1e9)
    weights = np.random.RandomState(0).standard_normal((5, 3)).astype(np.float32)
    grads = np.random.RandomState(1).standard_normal((4, 5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(weights.copy()))
    adamw = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-10, weight_decay=config.weight_decay
    )
    optimizer, ours = make_optimizer(config), jnp.asarray(weights)
    state = optimizer.init(ours)
    for grad in grads:
        theirs.grad = torch.tensor(grad)
        adamw.step()
        updates, state = optimizer.update(jnp.asarray(grad), state, ours)
        ours = ours - 1e-2 * updates
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_muon_takes_the_projections_of_all_blocks_and_nothing_else():
    config = MMDiTConfig(2, 1, 2, (8, 8), False, False, head_width=16, time_width=16)
    model = jax.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    found = jax.tree_util.tree_leaves_with_path(labels(model))
    muon = {jax.tree_util.keystr(path) for path, label in found if label == "muon"}
    projections = [f"attention.{name}" for name in ("q", "k", "v", "out")] + ["mlp.up", "mlp.down"]
    streams = "blocks[0].video", "blocks[0].text", "blocks[1].video"  # the upper block shares
    assert muon == {f".{s}.{name}.kernel.value" for s in streams for name in projections}


def test_an_update_of_muon_is_orthogonal_and_as_large_as_adams():
    weights = {"blocks": {"mlp": {"kernel": jnp.zeros((2, 24, 96))}}, "bias": jnp.zeros(5)}
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((2, n, 24)))[0] for n in (24, 96))
    kernel = (left * np.geomspace(1, 30, 24)) @ right.transpose(0, 2, 1)
    grads = {"blocks": {"mlp": {"kernel": jnp.float32(kernel)}}, "bias": jnp.arange(5.0)}
    adam, muon = (make_optimizer(OptimizerConfig(name)) for name in ("adam", "muon"))
    state = muon.init(weights)
    updates, _ = muon.update(grads, state, weights)
    update = updates["blocks"]["mlp"]["kernel"]
    singular = np.linalg.svd(update, compute_uv=False)
    assert singular.max() / singular.min() < 2  # of the gradient itself 30
    assert float(jnp.sqrt(jnp.mean(update**2))) == pytest.approx(0.2, rel=0.2)
    by_adam, _ = adam.update(grads, adam.init(weights), weights)
    np.testing.assert_allclose(updates["bias"], by_adam["bias"], rtol=1e-6)
    large = [x for x in jax.tree.leaves(state) if x.size == 2 * 24 * 96]
    assert len(large) == 1  # one moment, where Adam has two


def test_random_rounding_keeps_the_expected_value():
    for value in (1.0, 1.001, -3.3e-5, 7e4):
        drawn = round_at_random(jnp.full(40_000, value), jax.random.key(0))
        assert drawn.dtype == jnp.bfloat16 and len(set(np.asarray(drawn, np.float32))) <= 2
        assert float(jnp.mean(drawn.astype(jnp.float32))) == pytest.approx(value, rel=1e-4)


def test_a_second_moment_in_bfloat16_follows_changes_below_its_steps():
    """It falls by a thousandth per update; nearest rounding would keep its first value forever."""
    exact = optax.scale_by_adam(0.9, 0.999, 1e-10)
    rounded = in_bfloat16(exact)
    states = [x.init(jnp.zeros(1000)) for x in (exact, rounded)]
    rng = np.random.default_rng(0)

    @jax.jit
    def update(grads, states):
        return [x.update(grads, s)[1] for x, s in zip((exact, rounded), states, strict=True)]

    for size in (10.0,) * 5 + (0.1,) * 1500:
        states = update(jnp.float32(size * rng.standard_normal(1000)), states)
    moments = [states[0].nu, states[1].rounded.nu.astype(jnp.float32)]
    assert states[1].rounded.nu.dtype == jnp.bfloat16 and states[1].count == 1505
    wanted, found = (float(jnp.mean(x)) for x in moments)
    assert wanted < 0.3 * 5e-3 * 100 and found == pytest.approx(wanted, rel=0.05)


def test_adafactor_updates_each_layer_of_a_stack_as_optax_does_alone():
    rng = np.random.default_rng(0)
    grads = jnp.float32(rng.standard_normal((2, 130, 140)) * rng.random((2, 130, 1)))
    weights = {"blocks": {"mlp": {"kernel": jnp.zeros_like(grads)}}, "bias": jnp.zeros(5)}
    config = OptimizerConfig("adafactor", b1=0.0, max_grad_norm=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config)
    state = optimizer.init(weights)
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    theirs = [alone.init(x) for x in grads]
    for factor in (1.0, 3.0, 0.5):
        tree = {"blocks": {"mlp": {"kernel": factor * grads}}, "bias": jnp.arange(5.0)}
        updates, state = optimizer.update(tree, state, weights)
        for layer in range(2):
            expected, theirs[layer] = alone.update(
                factor * grads[layer], theirs[layer], jnp.zeros((130, 140))
            )
            ours = updates["blocks"]["mlp"]["kernel"][layer]
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert max(x.size for x in jax.tree.leaves(state)) <= 2 * 140
    kept = make_optimizer(OptimizerConfig("adafactor", moments="bfloat16")).init(weights)
    large = [x for x in jax.tree.leaves(kept) if x.size == grads.size]
    assert [x.dtype for x in large] == [jnp.bfloat16]


def test_the_first_pattern_that_matches_gives_the_factor_of_the_rate():
    config = MMDiTConfig(2, 1, 2, (8, 8), False, False, head_width=16, time_width=16)
    weights = nnx.state(MMDiT(config, rngs=nnx.Rngs(0)))
    rates = (("blocks.*.attention.q.*", 0.0), ("blocks.*", 0.5))
    update = jax.jit(scale_rates(rates).update)
    scaled = named_weights(update(weights, optax.EmptyState())[0])
    for name, value in named_weights(weights).items():
        factor = 0.5 if name.startswith("blocks.") else 1.0
        factor = 0.0 if ".attention.q." in name else factor
        np.testing.assert_array_equal(scaled[name], factor * value, err_msg=name)
