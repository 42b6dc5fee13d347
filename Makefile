# From a fresh clone: `make test`, or `make quickstart` to see a model train. Both install what is missing first.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DETECTRON2 ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python

# OpenMP threads that spin while they wait make training many times slower on shared cores.
export OMP_WAIT_POLICY := passive
export PIP_NO_INPUT := 1

# Whether a variable comes from the caller rather than from the defaults above.
given = $(filter-out file,$(origin $(1)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart zoo test lint format clean

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'Variables, with their present values:'
	@echo '  PYTHON=$(PYTHON)  the Python (3.10 or newer) that creates the environment'
	@echo '  VENV=$(VENV)  the environment; an existing one may be named'
	@echo '  TORCH="$(TORCH)"  what pip installs as torch: requirements and options of pip'
	@echo '  DETECTRON2="$(DETECTRON2)"  a pip requirement of the real Detectron2; if empty, the one that the'
	@echo '      environment has already, else ./detectron2_lite'
	@echo '  PYTEST_ARGS="$(PYTEST_ARGS)"  further arguments for make test'

install:  ## create or update the environment; does nothing if it is up to date
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'error: "$(PYTHON)" is no Python of version 3.10 or newer; name one with PYTHON=, e.g. PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) tools/install.py --venv '$(VENV)' \
	  --torch '$(TORCH)' $(if $(call given,TORCH),,--torch-is-default) \
	  --detectron2 '$(DETECTRON2)' $(if $(call given,PYTHON),--this-python)

quickstart: install  ## train and evaluate a small model on generated images, on the CPU, in minutes
	$(RUN) tools/quickstart.py

# Numbers of the model zoo; what is there is not measured again, so an interruption costs one file.
ZOO := output/zoo
ZOO_MODELS := $(filter-out quickstart%,$(patsubst configs/%.py,%,$(wildcard configs/*.py)))
# One model for each kind of attention in the encoder (ENCODERS of tools/model_zoo/document.py).
ZOO_ENCODERS := detr_dc5 act_detr deformable_detr_two_stage sparse_detr dino focus_detr
# Models whose published GFLOPs are a mean over images of COCO.
ZOO_MEANS := detr detr_dc5 deformable_detr_single_scale deformable_detr deformable_detr_refine \
  deformable_detr_two_stage sparse_detr
ZOO_SIZES := 400x667 600x1000 1000x1667
# Configs with overrides, as under "variants" in tools/published_figures.yaml.
ZOO_VARIANTS := $(patsubst %,$(ZOO)/analysis/%/variants/sparse_detr_rho_0.1.json,800x1333 850x1040)
ZOO_ANALYSES := $(ZOO_MODELS:%=$(ZOO)/analysis/800x1333/%.json) $(ZOO_VARIANTS) \
  $(patsubst %,$(ZOO)/analysis/%.json,850x1040 $(ZOO_SIZES))
ZOO_BENCHMARKS := $(patsubst %,$(ZOO)/benchmark/%.json,800x1333 $(ZOO_SIZES))
ZOO_RESULTS := output/quickstart/results.json

zoo: install $(ZOO_ANALYSES) $(ZOO_BENCHMARKS) $(ZOO_RESULTS)  ## measure all full-size models and write docs/model_zoo.md; half an hour on two idle cores
	$(RUN) -m tools.write_model_zoo --analysis $(ZOO_ANALYSES) --benchmark $(ZOO_BENCHMARKS) \
	  --results quickstart=$(ZOO_RESULTS)

$(ZOO)/analysis/%/variants/sparse_detr_rho_0.1.json: | install
	@mkdir -p $(@D)
	$(RUN) tools/analyze_model.py --image-size $(subst x, ,$*) --json $@ --config-file configs/sparse_detr.py \
	  --opts model.detector.selection.keep_ratio=0.1

$(ZOO)/analysis/800x1333/%.json: | install
	@mkdir -p $(@D)
	$(RUN) tools/analyze_model.py --image-size 800 1333 --json $@ --config-file configs/$*.py

$(ZOO)/analysis/%.json: | install
	@mkdir -p $(@D)
	$(RUN) tools/analyze_model.py --image-size $(subst x, ,$*) --json $@ --config-file \
	  $(patsubst %,configs/%.py,$(if $(filter 850x1040,$*),$(ZOO_MEANS),$(ZOO_ENCODERS)))

# After all counting, which must not disturb it. Models that run out of memory are left out.
$(ZOO)/benchmark/%.json: | install $(ZOO_ANALYSES)
	@mkdir -p $(@D)
	$(RUN) tools/benchmark.py --image-size $(subst x, ,$*) --threads 1 --rounds 3 --json $@ --config-file \
	  $(patsubst %,configs/%.py,$(if $(filter 800x1333,$*),$(ZOO_MODELS),$(ZOO_ENCODERS))) || test -f $@

$(ZOO_RESULTS): | install
	$(RUN) tools/quickstart.py

test: install  ## run all tests; those that need a GPU are skipped where there is none
	$(RUN) -m pytest --durations=5 $(PYTEST_ARGS)

lint: install  ## check style, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install  ## mend what the linter can mend by itself, and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## delete caches and build products; keeps the environment, output/ and datasets/
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache projects/*.egg-info detectron2_lite/build
	rm -f projects/efficient_detr/ops/_kernels_*
	find projects tests tools configs detectron2_lite -name __pycache__ -prune -exec rm -rf {} +
