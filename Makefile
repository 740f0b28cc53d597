# The pipeline as make targets; `make help` lists them. Each runs what it depends on first and skips what is up to date.
DATASET   ?= ml-100k
RETRIEVER ?= 2mamba4rec
RANKER    ?= llamarec-smollm2-135m
RECIPE    ?= quick
VARIANT   ?=
ACCELERATE ?=
NPROC     ?=
ARGS      ?=
PYTHON    ?= python3

BIN    := .venv/bin
DATA   := --dataset $(DATASET)
# e.g. ACCELERATE=fsdp2 NPROC=8: retrieve, sft, orpo and evaluate go through `accelerate launch` (recipes/accelerate)
LAUNCH  = $(if $(ACCELERATE),--accelerate $(ACCELERATE)) $(if $(NPROC),--processes $(NPROC)) $(ARGS)
RANKING = $(DATA) --retriever $(RETRIEVER) --ranker $(RANKER) --recipe $(RECIPE) $(if $(VARIANT),--variant $(VARIANT)) $(LAUNCH)

.PHONY: help setup prepare retrieve pairs sft orpo evaluate order bench runs doctor test test-slow lint clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/:/' | column -t -s ':'

setup: .venv/ready  ## .venv with pinned dependencies

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmrec needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

prepare: setup   ## raw files -> tables, split
	@$(BIN)/llmrec prepare --chain $(DATA) $(ARGS)

retrieve: setup  ## train a retriever, write candidates
	@$(BIN)/llmrec retrieve --chain $(DATA) --retriever $(RETRIEVER) $(LAUNCH)

pairs: setup     ## prompts, SFT rows, preference pairs
	@$(BIN)/llmrec pairs --chain $(RANKING)

sft: setup       ## fine-tune on the next item
	@$(BIN)/llmrec sft --chain $(RANKING)

orpo: setup      ## the main job: everything up to the evaluation of the ORPO-tuned ranker
	@$(BIN)/llmrec evaluate --chain $(RANKING)

evaluate: orpo   ## the same

order: setup     ## does order matter here? a trained retriever asked about shuffled histories
	@$(BIN)/llmrec order --chain $(DATA) --retriever $(RETRIEVER) $(ARGS)

bench: setup     ## time finished models: latency with intervals, memory, parameters
	@$(BIN)/llmrec bench --chain $(DATA) $(if $(VARIANT),--variant $(VARIANT)) $(ARGS)

runs: setup      ## what exists
	@$(BIN)/llmrec runs

doctor: setup    ## versions, devices, what is missing
	@$(BIN)/llmrec doctor

test: setup      ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test-slow: setup ## the slow ones
	$(BIN)/python -m pytest -m slow

lint: setup      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:           ## remove .venv and build leftovers; runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
