# Everything runs in .venv, made from a Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
CPU := JAX_PLATFORMS=cpu

.PHONY: setup demo demo-long demo-real test slow bench lint clean

setup: .venv/ready

.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# The staged schedule, small but whole: files -> VAE -> latents -> five stages -> score and report.
demo: setup
	$(BIN)/python -m easyanimate_jax.evaluation.demo configs/demo.py

demo-long: setup
	$(BIN)/python -m easyanimate_jax.evaluation.demo configs/demo_long.py

test: setup
	$(CPU) $(BIN)/pytest

slow: setup
	$(CPU) $(BIN)/pytest -m slow

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv runs build *.egg-info
