import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easyanimate_jax.training.optimizer import OptimizerConfig, clip_abnormal, make_optimizer


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
