"""Where compiled programs are kept by default, and what a bad folder or entry costs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from easyanimate_jax.commands.jax_settings import MAX_BYTES, set_up_jax

ROOT = Path(__file__).parent.parent
FOLDER, SIZE = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"


def test_programs_are_kept_in_the_user_s_cache(tmp_path):
    variables = {"XDG_CACHE_HOME": str(tmp_path)}
    set_up_jax(variables)
    folder = tmp_path / "easyanimate_jax" / "compiled"
    assert variables[FOLDER] == str(folder) and variables[SIZE] == str(MAX_BYTES)
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", ["/elsewhere", ""])
def test_what_the_user_says_is_kept(given, tmp_path):
    variables = {"XDG_CACHE_HOME": str(tmp_path), FOLDER: given}
    set_up_jax(variables)
    assert variables[FOLDER] == given and SIZE not in variables
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "relative")
    set_up_jax(variables := {})
    assert FOLDER not in variables and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["", "easyanimate_jax", "easyanimate_jax/compiled"])
def test_a_folder_that_cannot_be_made_costs_a_line(where, tmp_path, caplog):
    place = tmp_path / "cache" / where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file")
    set_up_jax(variables := {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert FOLDER not in variables
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "cannot be written" in record.getMessage()
    assert FOLDER in record.getMessage()


def test_entries_that_a_kill_cut_short_are_removed(tmp_path):
    folder = tmp_path / "easyanimate_jax" / "compiled"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "half-cache", "now-cache"):
        (folder / name).write_bytes(b"x")
        old = time.time() - (0 if name == "now-cache" else 3600)
        os.utime(folder / name, (old, old))
    set_up_jax({"XDG_CACHE_HOME": str(tmp_path)})
    left = {path.name for path in folder.iterdir()} - {".writable"}
    assert left == {"whole-cache", "whole-atime", "now-cache"}


# Compiles one function three times: the second start finds damaged entries, the third whole ones.
DAMAGED = """
import os, sys, warnings
from pathlib import Path
from easyanimate_jax.commands.jax_settings import set_up_jax

set_up_jax()
import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

folder, hits = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
for how in ("new", "damaged", "mended"):
    entries = list(folder.glob("*-cache"))
    assert bool(entries) == (how != "new")
    if how == "damaged":
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    elif how == "mended":
        for entry in entries:
            entry.unlink()
    jax.clear_caches()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        print(how, float(jax.jit(lambda x: jnp.sin(x) + x)(1.0)), len(hits), len(told) > 0)
jax.clear_caches()
print("again", float(jax.jit(lambda x: jnp.sin(x) + x)(1.0)), len(hits) > 0)
"""


def test_a_damaged_entry_costs_a_compilation_and_breaks_nothing(tmp_path):
    variables = {k: v for k, v in os.environ.items() if k != FOLDER}
    variables |= {"XDG_CACHE_HOME": str(tmp_path)}
    variables |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["new", "damaged", "mended", "again"]
    assert len({line[1] for line in lines}) == 1
    assert [line[2] for line in lines[:3]] == ["0", "0", "0"] and lines[3][2] == "True"
    assert lines[1][3] == "True"  # JAX warns of the entry
