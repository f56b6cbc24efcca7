# `make` alone prints what there is.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --use-pep517
DEMO := outputs/demo
PRESET ?= full
RUNS ?= outputs
SEEDS ?=
DATA ?=
LAUNCHER ?= basic
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
TABLE_OPTIONS = --preset $(PRESET) $(if $(DRY),--dry) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(DATA),--data $(DATA)) \
	--launcher $(LAUNCHER)
DEMO_ROWS := demo/dense,demo/checkpointing,demo/compact90,demo/compact97
TWO_AT_A_TIME := hydra/launcher=joblib hydra.launcher.n_jobs=2

.DEFAULT_GOAL := help
.PHONY: help bench bench-gpu demo reproduce-table1 reproduce-table2 reproduce-table3 reproduce-digits report test test-all lint docs docs-serve tensorboard clean

help: ## Print this list
	@echo "Back Razor: fine-tuning with the activations kept for backward pruned"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Fine-tune a pretrained network on digits four ways, three seeds each, and print the table
	$(RUN) train.py -m $(TWO_AT_A_TIME) experiment=$(DEMO_ROWS) seed=0,1,2 trainer.resume=never trainer.progress=false
	$(RUN) -m razorlab measure $(DEMO)
	$(RUN) -m razorlab tables $(DEMO) --expect demo

reproduce-table1: $(VENV)/.installed ## ProxylessNAS, eight methods, three more networks, eight data sets; PRESET=smoke, DRY=1, DATA=pets, SEEDS=0
	$(RUN) -m razorlab reproduce table1 $(TABLE_OPTIONS)

reproduce-table2: $(VENV)/.installed ## ViT-B/16, eight methods, eight data sets; PRESET=smoke, DRY=1, DATA=pets, SEEDS=0
	$(RUN) -m razorlab reproduce table2 $(TABLE_OPTIONS)

reproduce-table3: $(VENV)/.installed ## Memory of every backbone, sparsity and preset; PRESET=smoke, DRY=1
	$(RUN) -m razorlab table3 --preset $(PRESET) $(if $(DRY),--dry)

reproduce-digits: $(VENV)/.installed ## Accuracy against memory on embedded digits, ten methods, three seeds
	$(RUN) -m razorlab reproduce digits $(if $(SEEDS),--seeds $(SEEDS)) --launcher $(LAUNCHER)
	$(RUN) -m razorlab measure outputs/digits --missing
	$(RUN) -m razorlab reproduce digits $(if $(SEEDS),--seeds $(SEEDS))

report: $(VENV)/.installed ## Write one HTML page from the records below outputs/ (RUNS=outputs/demo: of those)
	$(RUN) -m razorlab report $(RUNS)

test: $(VENV)/.installed-dev ## Run the test suite but for its slow tests, one process per core
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.installed-dev ## Run every test; this is what CI runs
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PARALLEL)

bench: $(VENV)/.installed-dev ## Measure a training step beside its rivals on every backbone (QUICK=1: one backbone in five minutes)
	$(RUN) -m razorlab bench $(if $(QUICK),--backbones efficientnet_lite0 --quick)

bench-gpu: $(VENV)/.installed-dev ## Measure a training step on one CUDA device: ViT-B/16 and ProxylessNAS (QUICK=1: main rows)
	$(RUN) -m razorlab bench-gpu $(if $(QUICK),--quick)

lint: $(VENV)/.installed-dev ## Check style, and the types of the public interface
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-dev ## Build the site into build/site, without network; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

docs-serve: $(VENV)/.installed-dev ## Show the site in the browser, built anew when a page changes
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve --watch src --watch README.md

tensorboard: $(VENV)/.installed ## Show the runs below outputs/ in the browser
	$(VENV)/bin/tensorboard --logdir outputs

clean: ## Remove .venv, caches and build folders; runs in outputs/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is the last thing that a new environment gets: one that broke off before is made up for.
$(VENV)/bin/pip:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/bin/pip
	@echo "Packages go to $(VENV), about 6.5 GB with the CUDA build of PyTorch: some minutes without a word"
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(INSTALL) -r requirements-dev.txt
	touch $@
