"""Room for a safetensors file before its first byte."""

import errno
import os

import numpy as np
import pytest

from easyanimate_jax.weights import files
from easyanimate_jax.weights.lazy import Tensor

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_a_full_disk_shows_before_anything_is_read(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, f"no room for {size} bytes")

    def read(box):
        raise AssertionError("read")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for \d+ bytes") as raised:
        files.write_file(tmp_path / "a", {"x": Tensor(ROWS.shape, ROWS.dtype, read)})
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_system_that_cannot_reserve_gets_the_same_file(tmp_path, monkeypatch, code):
    files.write_file(tmp_path / "reserved", {"x": Tensor.of(ROWS)})
    if code is None:  # macOS
        monkeypatch.delattr(os, "posix_fallocate")
    else:

        def refuse(descriptor, offset, size):
            raise OSError(code, "not here")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    files.write_file(tmp_path / "plain", {"x": Tensor.of(ROWS)})
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "reserved").read_bytes()
    found = files.open_file(tmp_path / "plain", [])["x"]
    np.testing.assert_array_equal(found.read((slice(0, 3), slice(0, 4))), ROWS)
