# make help lists the targets. Everything runs in .venv, which every target prepares.
.NOTPARALLEL:
.DEFAULT_GOAL := help
SHELL := /bin/sh

# What the last set-up was told (CONSTRAINTS, EXTRAS, PIP_ARGS), so that later commands need not repeat it.
VENV := .venv
-include $(VENV)/setup.mk

RECIPE ?= tiny
ARTIFACTS ?= artifacts
RUN ?=
SET ?=
FORCE ?=
DRY_RUN ?=
LAUNCH ?=
TOKENIZER ?=
REWARD ?=
AGAINST ?=
STAGE ?=
DATA ?=
JOBS ?= 2
PYTHON ?= python3
CONSTRAINTS ?= $(or $(SETUP_CONSTRAINTS),constraints.txt)
DEFAULT_EXTRAS := tiny,dev,data
EXTRAS ?= $(or $(SETUP_EXTRAS),$(DEFAULT_EXTRAS))
PIP_ARGS ?= $(SETUP_PIP_ARGS)

# They stand between double quotes in the commands below, where a shell would go on reading these four characters.
QUOTED := RECIPE ARTIFACTS RUN REWARD AGAINST STAGE DATA TOKENIZER
UNSAFE = $(findstring ",$(1))$(findstring `,$(1))$(findstring $$,$(1))$(findstring \,$(1))
$(foreach name,$(QUOTED),$(if $(call UNSAFE,$(value $(name))),$(error $(name) has one of " ` $$ \ in it: take another name)))

STAMP := $(VENV)/.ready
PY := $(VENV)/bin/python
# `accelerate launch ...` comes from the environment's bin folder and takes -m as python does.
# With --cpu and --num_processes it starts one process and says nothing unless MPI is there: gloo needs the config file.
CPU_CONFIG := --config_file "$(CURDIR)/pipelines/accelerate/cpu.yaml"
ON_CPU = $(and $(filter --cpu,$(LAUNCH)),$(findstring --num_processes,$(LAUNCH)),$(if $(findstring --mpirun,$(LAUNCH)),,gloo))
LAUNCHER = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(or $(if $(ON_CPU),$(patsubst --cpu,$(CPU_CONFIG),$(LAUNCH)),$(LAUNCH)),python)
COMMON = --recipe "$(RECIPE)" --artifacts "$(ARTIFACTS)" $(if $(RUN),--run "$(RUN)") $(if $(DRY_RUN),--dry-run)
RUN_STAGE = $(LAUNCHER) -m pipelines.$(1) $(COMMON) $(if $(FORCE),--force) $(SET)
RUN_DIR = $(abspath $(ARTIFACTS))/$(or $(RUN),$(basename $(notdir $(RECIPE))))
OTHER = $(if $(REWARD),--as "$(REWARD)")
UNFORCED = $(LAUNCHER) -m pipelines.$(1) $(COMMON) $(SET)

.PHONY: help setup data label-select label convert pretrain sft reward ppo evaluate report status notebook test test-slow test-gpu optimum mutation audit check format bench-env bench clean

help: ## list the targets
	@echo 'make sft reward ppo    runs the default recipe end to end. Variables:'
	@echo '  RECIPE=tiny|path.yaml  RUN=name  ARTIFACTS=dir  SET="ppo.kl_coef=0.1 ..."  FORCE=1  DRY_RUN=1'
	@echo '  LAUNCH="accelerate launch --num_processes 8"  CONSTRAINTS=file  EXTRAS=tiny,dev,data  PIP_ARGS=...  PYTHON=python3'
	@echo
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:[^#]*## /\t/' | awk -F '\t' '{printf "  %-12s %s\n", $$1, $$2}'

# Another CONSTRAINTS, EXTRAS or PIP_ARGS than the last time: install again.
ifneq ($(CONSTRAINTS)|$(EXTRAS)|$(PIP_ARGS),$(SETUP_CONSTRAINTS)|$(SETUP_EXTRAS)|$(SETUP_PIP_ARGS))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), 3.11 or later is needed: set PYTHON=python3.11" >&2; exit 2; }
	@echo "preparing $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@printf 'SETUP_CONSTRAINTS := %s\nSETUP_EXTRAS := %s\nSETUP_PIP_ARGS := %s\n' '$(CONSTRAINTS)' '$(EXTRAS)' '$(PIP_ARGS)' > $(VENV)/setup.mk
	@touch $@

setup: $(STAMP) ## prepare .venv: pinned by CONSTRAINTS, which GPU users may replace

pretrain: $(STAMP) ## make the base model, where the recipe asks for it
	@$(call RUN_STAGE,pretrain)

data: $(STAMP) ## clean one data recipe (RECIPE=hh_rlhf or a path) into ARTIFACTS/data/NAME, with manifest, card and bad rows
	@$(if $(filter file,$(origin RECIPE)),{ echo "error: make data: RECIPE names a data recipe here (RECIPE=hh_rlhf)" >&2; exit 2; })
	@$(PY) -m pipelines.data --recipe "$(RECIPE)" --artifacts "$(ARTIFACTS)" $(if $(FORCE),--force) $(if $(TOKENIZER),--tokenizer "$(TOKENIZER)")

label-select: $(STAMP) ## choose N pairs of DATA=recipe for annotators: METHOD=mix FEATURES=words|folder|sft REWARD="reward reward_b" SPLIT=train SEED=0 MAX_LENGTH=512
	@$(PY) -m pipelines.label_select --data "$(DATA)" $(if $(N),--count "$(N)") $(if $(METHOD),--method "$(METHOD)") $(if $(FEATURES),--features "$(FEATURES)") \
	  $(if $(SPLIT),--split "$(SPLIT)") $(if $(SEED),--seed "$(SEED)") $(if $(MAX_LENGTH),--max-length "$(MAX_LENGTH)") \
	  $(if $(REWARD),--reward $(REWARD)) --recipe "$(RECIPE)" $(if $(RUN),--run "$(RUN)") --artifacts "$(ARTIFACTS)"

label: $(STAMP) ## the labelling page for the pairs of DATA=recipe, on this machine alone: PORT=8765
	@$(PY) -m pipelines.label --data "$(DATA)" --artifacts "$(ARTIFACTS)" $(if $(PORT),--port "$(PORT)")

convert: $(STAMP) ## the base model of RECIPE as a plain folder OUT=bases/RECIPE, checked against what it came from
	@$(PY) -m pipelines.convert --recipe "$(RECIPE)" --out "$(or $(OUT),bases/$(basename $(notdir $(RECIPE))))" $(SET)

sft: $(STAMP) ## supervised fine-tuning (pretrain first, where the recipe asks for it)
	@$(call UNFORCED,pretrain)
	@$(call RUN_STAGE,sft)

reward: $(STAMP) ## scalar reward model, and the report on it; REWARD=reward_b SET=reward.seed=1 makes another one
	@$(call RUN_STAGE,reward) $(OTHER)

ppo: $(STAMP) ## PPO, then evaluate
	@$(call RUN_STAGE,ppo)
	@$(call UNFORCED,evaluate)

evaluate: $(STAMP) ## SFT against PPO on held-out prompts: table, reward against KL, pictures, samples
	@$(call RUN_STAGE,evaluate)

report: $(STAMP) ## all of a run on one page, artifacts/RUN/report.html; AGAINST=other_run; STAGE=reward measures that model again
	@$(call UNFORCED,report) $(if $(STAGE),--stage "$(STAGE)") $(OTHER) $(if $(AGAINST),--against "$(AGAINST)")

status: $(STAMP) ## runs, their stages, and what is stale; VERIFY=1 reads every file and compares it with the manifest
	@$(PY) -m pipelines.status --artifacts "$(ARTIFACTS)" $(if $(VERIFY),--verify)

notebook: $(STAMP) ## execute the notebooks on a finished run, and compare it with AGAINST=other_run
	@RLHF_RUN_DIR="$(RUN_DIR)" RLHF_RUNS="$(RUN_DIR)$(AGAINST:%=,$(abspath $(ARTIFACTS))/%)" $(VENV)/bin/jupyter execute --inplace notebooks/*.ipynb

# One thread each: two processes of two threads on two cores wait for each other.
test: $(STAMP) ## unit, contract and integration tests, offline; JOBS=2 processes
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not gpu" -n $(JOBS) --dist loadgroup

test-slow: $(STAMP) ## the tests that take minutes
	@HF_HUB_OFFLINE=1 $(PY) -m pytest -m slow

test-gpu: $(STAMP) ## the tests that need a GPU
	@HF_HUB_OFFLINE=1 $(PY) -m pytest -m gpu tests/gpu

audit: $(STAMP) ## known vulnerabilities of the pinned packages (asks PyPI's advisory service; --strict: no answer is a failure)
	@$(PY) -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[audit]"
	@$(PY) -m pip_audit --requirement $(CONSTRAINTS) --no-deps --disable-pip --strict

optimum: $(STAMP) ## how near PPO comes to the optimum that can be written down (docs/ppo.md)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m benchmarks.optimum

mutation: $(STAMP) ## break the mathematics line by line and see which tests notice (docs/mutation.md)
	@$(PY) -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[mutation]"
	@rm -rf mutants
	@HYPOTHESIS_PROFILE=mutation HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run --max-children 1
	@$(VENV)/bin/mutmut results

format: $(STAMP) ## rewrite the code in the project's style
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

check: $(STAMP) ## format, lint, types, tests
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy
	@$(MAKE) --no-print-directory test

bench-env: $(CONSTRAINTS) ## prepare .venv-trl: TRL 1.12.0, which the benchmarks compare with
	@$(PYTHON) -m venv .venv-trl
	@grep '^torch==' $(CONSTRAINTS) > .venv-trl/torch.txt
	@.venv-trl/bin/python -m pip install --quiet $(PIP_ARGS) -r .venv-trl/torch.txt -r benchmarks/requirements-trl.txt

bench: $(STAMP) ## speed beside TRL on this CPU, about 5 minutes; first `make bench-env` and `make sft reward` (docs/performance.md)
	@$(PY) -m benchmarks.cpu --run "$(ARTIFACTS)/$(or $(RUN),tiny)"

clean: ## remove caches (artifacts and .venv stay)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis mutants build dist *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
