"""`prepare --engine ray` as a user gives it, with models in folders."""

import pytest
from test_engine import drivers as drivers  # a fixture: what starts commands where Ray is alone
from test_engine import films, made
from test_export import parts as parts  # a fixture: VAE, text encoder and tokenizer

CONFIG = """
import dataclasses
from configs.demo import config as demo
from easyanimate_jax.data.buckets import Budget

budget = Budget(12, (12,), (32,), frames=9)
sets = (dataclasses.replace(s, budget=budget, kinds=("video",), min_side=0) for s in demo.sets)
config = dataclasses.replace(demo, sets=tuple(sets))
"""


@pytest.mark.slow
def test_the_command_makes_the_same_sets_with_an_engine_and_without(tmp_path, drivers, parts):
    films(tmp_path / "source", 4)
    (tmp_path / "config.py").write_text(CONFIG)
    words = ["-m", "easyanimate_jax", "prepare", str(tmp_path / "config.py")]
    words += ["--vae", str(parts / "vae"), "--text", str(parts)]
    words += ["--source", str(tmp_path / "source"), "--prepared"]
    for more in ([str(tmp_path / "alone")], [str(tmp_path / "out"), "--engine", "ray"]):
        with drivers.run([*words, *more]) as command:
            code = command.wait()
        assert code == 0, drivers.log.read_text()
    files, expected = made(tmp_path / "out"), made(tmp_path / "alone")
    assert files.keys() == expected.keys() and len([n for n in files if "shard" in n]) == 5
    assert [name for name in files if files[name] != expected[name]] == []
