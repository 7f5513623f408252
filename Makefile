# Every target sets up .venv by itself when it is missing or older than the files that describe it.
PYTHON ?= python3.11
VENV   ?= .venv
MODEL  ?= tiny
RECIPE ?= w4a4kv4
TEXT   ?=
CALIBRATE ?=
RUN    ?= runs/$(notdir $(MODEL:%/=%))-$(basename $(notdir $(RECIPE)))
RUNS   ?=
ARGS   ?=
GPUS   ?= 1

BIN   := $(VENV)/bin
RANKS := $(if $(filter 1,$(GPUS)),$(BIN)/rotoboa,$(BIN)/torchrun --standalone --nproc-per-node $(GPUS) -m rotoboa)
STAMP := $(VENV)/.ready

.PHONY: help setup quantize evaluate test quick lint bench bench-accept accuracy runtime ablation methods real real-check real-tasks \
	verify runtimes memory ranks speed sweep clean
.DEFAULT_GOAL := help

help:
	@echo 'make TARGET [MODEL=...] [RECIPE=...] [RUN=...] [GPUS=...] [ARGS="..."]'
	@awk '/^##@ / {print "\n" substr($$0, 5) ":"} \
		/^[a-z-]+:.*## / {name = $$1; sub(/:$$/, "", name); sub(/^.*## /, ""); printf "  %-14s%s\n", name, $$0}' \
		$(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

##@ Quantize
quantize: $(STAMP)  ## quantize MODEL by RECIPE into RUN on GPUS (ARGS: any option of `rotoboa quantize`)
	$(RANKS) quantize --model "$(MODEL)" --recipe "$(RECIPE)" --output "$(RUN)" $(ARGS)

evaluate: $(STAMP)  ## measure the finished run in RUN again on GPUS (ARGS: --dataset, --tasks, ...)
	$(RANKS) evaluate "$(RUN)" $(ARGS)

##@ Develop
test: $(STAMP)  ## run the tests, a process with one thread on each core
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile $(ARGS)

quick: $(STAMP)  ## the tests of the mathematics, recipes and house, while you work
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto -m "not slow" --deselect tests/boa/solver/test_zero_heads.py \
		$(addprefix tests/,boa/solver boa/objective boa/online rotation pipeline/recipe/test_recipe.py test_house.py) $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/rotoboa
	cd $(VENV)/typing && $(abspath $(BIN))/mypy --config-file "$(CURDIR)/pyproject.toml" --package rotoboa
	cd benchmarks && MYPYPATH=$(abspath $(VENV))/typing $(abspath $(BIN))/mypy --config-file ../pyproject.toml --explicit-package-bases *.py

bench: $(STAMP)  ## the regression benchmark against benchmarks/baseline.json
	$(BIN)/python benchmarks/bench.py

bench-accept: $(STAMP)  ## make the figures of the last `make bench` the baseline
	$(BIN)/python benchmarks/bench.py --accept

##@ Measure, most of them for long
accuracy: $(STAMP)  ## the accuracy of the defaults on the embedded model, three calibration seeds
	$(BIN)/python benchmarks/accuracy.py

runtime: $(STAMP)  ## speed and memory of exported models on this machine (ARGS: --threads 1, ...)
	$(BIN)/python benchmarks/runtime.py $(ARGS)

ablation: $(STAMP)  ## what each lever is worth, in benchmarks/ablation.md (an hour on two cores); MODEL, TEXT, CALIBRATE
	$(BIN)/python benchmarks/ablation.py --model "$(MODEL)" --text "$(TEXT)" --calibrate "$(CALIBRATE)" $(ARGS)

methods: $(STAMP)  ## the methods of the field side by side, in benchmarks/methods.md (28 runs: hours on two cores)
	$(BIN)/python benchmarks/methods.py $(ARGS)

real: $(STAMP)  ## methods times recipes on MODEL, measured on TEXT, by CALIBRATE: benchmarks/real-MODEL.md (ARGS: --quick)
	$(BIN)/python benchmarks/real.py --model "$(MODEL)" --text "$(TEXT)" --calibrate "$(CALIBRATE)" $(ARGS)

real-check: $(STAMP)  ## hold the defaults on MODEL against benchmarks/real-check.json (some minutes; ARGS: --accept)
	$(BIN)/python benchmarks/real_check.py --model "$(MODEL)" --text "$(TEXT)" --calibrate "$(CALIBRATE)" $(ARGS)

real-tasks: $(STAMP)  ## the eight zero-shot tasks of MODEL, a folder, and of finished RUNS of it: benchmarks/real-tasks-MODEL.md
	$(BIN)/python benchmarks/real_tasks.py --model "$(MODEL)" --runs "$(RUNS)" $(ARGS)

verify: $(STAMP)  ## export the embedded model in every format and compare each with its run
	$(BIN)/python benchmarks/verify.py

runtimes: $(STAMP)  ## run exports in vLLM, GPTQModel, mlx-lm, llama.cpp, each in a .venv of its own: benchmarks/runtimes.md
	$(BIN)/python benchmarks/runtimes.py $(ARGS)

memory: $(STAMP)  ## peak memory of 4 and of 32 blocks (ARGS=--large: and of a model of the shape of Llama-3-8B)
	$(BIN)/python benchmarks/memory.py $(ARGS)

ranks: $(STAMP)  ## one rank against two on this machine, in benchmarks/ranks.md (ARGS: --ranks 1,2,4, ...)
	$(BIN)/python benchmarks/ranks.py $(ARGS)

speed: $(STAMP)  ## seconds by stage of the quantizer (ARGS: --threads 0 for all, --write, ...)
	$(BIN)/python benchmarks/speed.py $(ARGS)

sweep: $(STAMP)  ## what becomes of each causal model type of transformers, in benchmarks/sweep.md (minutes)
	$(BIN)/python benchmarks/sweep.py $(ARGS)

##@ Environment
setup: $(STAMP)  ## create .venv with all that the other targets need; each of them does

clean:  ## remove the environment and caches, keep runs/
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
