"""A fingerprint is of bits and places, on any mesh, on the device and on the host alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from easyanimate_jax.sharding import MeshConfig, make_mesh
from easyanimate_jax.weights.fingerprint import fingerprint, fingerprint_box

X = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)


def of(x) -> int:
    return int(fingerprint(jnp.asarray(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_device_and_host_agree(dtype):
    x = jnp.asarray(10 * X).astype(dtype)
    assert of(x) == fingerprint_box(np.asarray(x), (0, 0, 0), x.shape)
    assert of(x[0, 0, 0]) == fingerprint_box(np.asarray(x[0, 0, 0]), (), ())


@pytest.mark.parametrize("spec", [("fsdp",), (None, "tensor"), ("fsdp", "tensor"), ()])
def test_every_mesh_gives_the_same_value(spec):
    mesh = make_mesh(MeshConfig(1, 4, 1, 2))
    placed = jax.device_put(X, NamedSharding(mesh, PartitionSpec(*spec)))
    assert of(placed) == of(X)


def test_boxes_add_up_to_the_whole():
    total = sum(
        fingerprint_box(X[a : a + 3, :, b : b + 2], (a, 0, b), X.shape)
        for a in (0, 3, 6)
        for b in (0, 2)
    )
    assert total % 2**32 == of(X)


def test_every_single_bit_and_every_swap_counts():
    rng, before = np.random.default_rng(1), of(X)
    for _ in range(64):
        other = X.copy()
        other.view(np.uint32).flat[rng.integers(X.size)] ^= np.uint32(1 << rng.integers(32))
        assert fingerprint_box(other, (0, 0, 0), X.shape) != before
    for other in (X[::-1], X.swapaxes(0, 1).reshape(X.shape), -X):
        assert of(other) != before
    assert of(np.float32(-0.0)) != of(np.float32(0.0))


def test_words_of_eight_bytes_are_refused():
    with pytest.raises(ValueError, match="1, 2 or 4 bytes"):
        fingerprint_box(np.zeros(3), (0,), (3,))
