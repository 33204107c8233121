"""The mesh and the table: eight devices compute what one computes, and misfits are named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from easyanimate_jax.models.mmdit import MMDiT, MMDiTConfig
from easyanimate_jax.sharding import MeshConfig, batch_sharding, make_mesh, shardings

TINY = MMDiTConfig(
    depth=2,
    mmdit_depth=1,
    heads=2,
    head_width=32,
    time_width=32,
    text_widths=(24, 40),
    text_norm=True,
    round_time=False,
    dtype="float32",
)
MESH = MeshConfig(data=1, fsdp=2, context=2, tensor=2)


def abstract_model(config=TINY):
    return jax.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))


def batch():
    rng = np.random.RandomState(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    grid = np.array([[1, 5, 4], [2, 2, 4], [3, 2, 4], [1, 2, 2]], np.int32)
    lengths = grid.prod(axis=1).astype(np.int32)
    time = np.array([0, 250, 500, 999], np.float32)
    return normal(4, 24, 64), grid, lengths, time, (normal(4, 5, 24), normal(4, 7, 40))


def loss(model, tokens, grid, lengths, time, texts):
    prediction = model(tokens, grid, lengths, time, texts)
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    return jnp.mean(jnp.where(real[..., None], prediction, 0) ** 2)


def loss_and_gradient(mesh):
    rng = np.random.RandomState(1)
    model = abstract_model()
    placed = shardings(mesh, model)
    model = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32), model)
    with jax.set_mesh(mesh):
        args = jax.device_put(batch(), batch_sharding(mesh, 1))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, placed))
        return step(jax.device_put(model, placed), *args)


@pytest.mark.slow
def test_eight_devices_differentiate_like_one(capfd):
    value, gradient = loss_and_gradient(make_mesh(MESH))
    assert "rematerialization" not in capfd.readouterr().err  # XLA's word for a bad resharding
    one_value, one_gradient = loss_and_gradient(make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_allclose(value, one_value, rtol=1e-5)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(one_gradient), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name
        )


def is_variable(x):
    return isinstance(x, nnx.Variable)


def test_every_weight_names_its_axes():
    model = abstract_model()
    for path, p in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_variable):
        assert len(p.out_sharding) == p.get_value().ndim, jax.tree_util.keystr(path)


def test_every_large_weight_is_split_over_all_devices():
    mesh = make_mesh(MESH)
    model = abstract_model()
    placed = jax.tree.leaves(shardings(mesh, model))
    for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(model), placed, strict=True):
        inside_block = "blocks" in jax.tree_util.keystr(path)
        if inside_block and "kernel" in jax.tree_util.keystr(path):
            assert np.prod(sharding.shard_shape(x.shape)) * 8 == x.size, jax.tree_util.keystr(path)


def test_a_mesh_that_does_not_divide_a_weight_is_refused_by_name():
    model = abstract_model(dataclasses.replace(TINY, time_width=33))
    with pytest.raises(ValueError, match=r"norm1.*33 does not split into 4 shards"):
        shardings(make_mesh(MESH), model)


def test_a_mesh_takes_the_devices_that_are_left():
    assert make_mesh(MeshConfig(tensor=2)).shape == {
        "data": 1,
        "fsdp": 4,
        "context": 1,
        "tensor": 2,
    }
    with pytest.raises(ValueError, match="product divides 8"):
        make_mesh(MeshConfig(tensor=3))
