"""The locked releases: what `make setup` installs is what setup.py allows, each with its hashes."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def locked(torch: str = "requirements-torch.lock") -> dict[str, tuple[Requirement, int]]:
    """The pins for this Python and platform, by name, with how many hashes each has."""
    pins = {}
    for file in ("requirements.lock", torch):
        text = re.sub(r"^#.*\n", "", (ROOT / file).read_text(), flags=re.MULTILINE)
        for entry in re.split(r"\n(?=\S)", text.strip()):
            pin = Requirement(entry.split("\\")[0])
            if pin.marker is None or pin.marker.evaluate():
                name = canonicalize_name(pin.name)
                assert name not in pins, f"{name} is locked twice"
                pins[name] = pin, entry.count("--hash=sha256:")
    return pins


@pytest.mark.parametrize("torch", ["requirements-torch.lock", "requirements-torch-cpu.lock"])
def test_every_pin_is_one_release_with_hashes_that_setup_py_allows(torch):
    pins = locked(torch)
    for name, (pin, hashes) in pins.items():
        assert [s.operator for s in pin.specifier] == ["=="], name
        assert hashes >= 1, name
    for text in distribution("easyanimate_jax").requires:
        wanted = Requirement(text)
        if wanted.marker is None or wanted.marker.evaluate({"extra": "dev"}):
            pin, _ = pins[canonicalize_name(wanted.name)]
            (release,) = pin.specifier
            assert wanted.specifier.contains(release.version), f"{pin} is not {wanted}"


def test_no_cuda_is_locked():
    assert not [name for name in locked() if name.startswith(("nvidia-", "cuda-"))]
