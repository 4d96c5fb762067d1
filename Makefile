# `make train` and `make test` work on a machine with only python3, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NPROC ?= 2
EXTRAS := dev,compare,report,decode,export,translation,docs
comma := ,
CORE_TESTS := $(addprefix tests/,$(addsuffix .py,test_contexts test_geometry test_registry test_sam test_scope test_two_pass engines/test_closure engines/test_groups))

.PHONY: train check test test-slow test-all test-versions lint lock docs bench report results clean

train: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train.py -c hparams/quickstart.yaml --opt samon-layerl2

# For the edit loop: style, types and the tests of the step.
check: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(NPROC) --dist loadscope -m "not slow" $(CORE_TESTS)

test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(NPROC) --dist loadscope -m "not slow"

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(NPROC) --dist loadscope -m slow

test-all: test test-slow

# The oldest, a middle and the newest versions of Python, torch and timm, in environments of their own
test-versions:
	tools/check_versions.sh

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-dev
	OMP_NUM_THREADS=$(NPROC) $(BIN)/python tools/bench_step.py --model resnet50 --img-size 128 --batch-size 16

# RUNS="output/train/RUN output/sweep/NAME"; everything under output/ if not given
report: $(VENV)/.installed
	$(BIN)/python tools/report.py $(or $(RUNS),output) -o report.html

# output/results.html and the figures of docs/, from the committed results of the experiments
results: $(VENV)/.installed
	$(BIN)/python tools/report.py $$(grep -l '"format":"samon-report' experiments/*/results.json) \
	  --title "Committed results" -o output/results.html
	$(BIN)/python tools/report.py experiments/tradeoff/results.json --figures output/figures
	cp output/figures/cost-flops-light.svg output/figures/cost-flops-dark.svg docs/images
	cp output/figures/cost-cpu_seconds-light.svg output/figures/cost-cpu_seconds-dark.svg docs/images
	$(BIN)/python tools/report.py experiments/vit_scratch/results.json --figures output/figures/vit
	cp output/figures/vit/cost-flops-light.svg docs/images/vit-cost-light.svg
	cp output/figures/vit/cost-flops-dark.svg docs/images/vit-cost-dark.svg
	cp output/figures/vit/rho-light.svg docs/images/vit-rho-light.svg
	cp output/figures/vit/rho-dark.svg docs/images/vit-rho-dark.svg
	$(BIN)/python tools/report.py experiments/few_images/results.json --figures output/figures/few
	cp output/figures/few/cost-flops-light.svg docs/images/few-cost-light.svg
	cp output/figures/few/cost-flops-dark.svg docs/images/few-cost-dark.svg
	$(BIN)/python tools/report.py experiments/label_noise/results.json --figures output/figures/noise
	cp output/figures/noise/curve-eval_top1-1-light.svg docs/images/noise-curve-light.svg
	cp output/figures/noise/curve-eval_top1-1-dark.svg docs/images/noise-curve-dark.svg
	$(BIN)/python tools/report.py experiments/fine_tuning/results.json --figures output/figures/fine
	cp output/figures/fine/cost-flops-light.svg docs/images/fine-cost-light.svg
	cp output/figures/fine/cost-flops-dark.svg docs/images/fine-cost-dark.svg
	$(BIN)/python experiments/flat_minima/flat_minima.py experiments/flat_minima/results.json --figures output/figures/flat
	cp output/figures/flat/rounding-light.svg docs/images/flat-rounding-light.svg
	cp output/figures/flat/rounding-dark.svg docs/images/flat-rounding-dark.svg
	cp output/figures/flat/corruption-light.svg docs/images/flat-corruption-light.svg
	cp output/figures/flat/corruption-dark.svg docs/images/flat-corruption-dark.svg

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# LOCKED=1: the versions of pylock.toml (Linux, Python 3.11); everything is installed, also for `make train`
$(VENV)/.installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(if $(LOCKED),$(BIN)/python -m pip install --quiet uv)
	$(if $(LOCKED),$(BIN)/uv pip install --quiet --python $(BIN)/python -r pylock.toml)
	$(BIN)/python -m pip install --quiet -e '.[report]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[$(EXTRAS)]'
	touch $@

lock: | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --custom-compile-command "make lock" --format pylock.toml \
	  --python $(BIN)/python $(addprefix --extra ,$(subst $(comma), ,$(EXTRAS))) pyproject.toml -o pylock.toml

clean:
	rm -rf $(VENV) output
