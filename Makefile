# Everything a person can ask for: `make help`. The work is in .make/setup.py, which needs nothing but
# Python, and runs without make too (README, "On Windows").
PYTHON ?= $(shell command -v python3 2>/dev/null || command -v python 2>/dev/null)
LAB_ARGS ?=
CHAPTERS ?=
AUTHOR =
RESET =
WHEELS =
TEST_ARGS ?=
export TORCH

ifeq ($(OS),Windows_NT)
RUN = .venv/Scripts/python
else
RUN = .venv/bin/python
endif
SETUP = $(if $(PYTHON),$(PYTHON),$(error No Python was found: install Python 3.11 to 3.13, or name one, as in `make lab PYTHON=/path/to/python3`)) .make/setup.py

.DEFAULT_GOAL := help
.PHONY: help lab preflight test test-full notebooks site workshop data models results bench bench-llama-cpp test-gpu bench-gpu check clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

lab: ## open your copies of the chapters in JupyterLab (LAB_ARGS="--no-browser --port 9999", TORCH=cpu, RESET=CHAPTER begins one again, AUTHOR=1 opens the originals)
	@$(if $(RESET),$(SETUP) reset $(RESET))
	@$(SETUP) $(if $(AUTHOR),author,lab) $(LAB_ARGS)

preflight: ## say within a minute whether this laptop is ready, with a sentence for each fault
	@$(SETUP) preflight

test: ## prove everything that takes minutes: methods, chapters, panels, pages (TEST_ARGS="tests/core")
	@$(SETUP) install test
	@$(if $(TEST_ARGS),,$(SETUP) browser)
	$(RUN) -m pytest $(TEST_ARGS)

test-full: ## prove everything, real models and long runs included
	@$(SETUP) install test
	@$(if $(TEST_ARGS),,$(SETUP) browser)
	EFFNB_FULL=1 $(RUN) -m pytest -m "not bench" $(TEST_ARGS)

notebooks: ## build each chapter's .ipynb from its .py by executing it (CHAPTERS="00_start_here")
	@$(SETUP) install test
	$(RUN) -m effnb.book.build $(CHAPTERS)

site: ## make the book's web pages, in build/site, from the chapters as they were executed; runs none
	@$(SETUP) install docs
	$(RUN) -m effnb.book.site

workshop: ## write the teacher's pack, in build/workshop, from the stored chapters (WHEELS=1 adds packages for a room without a network)
	@$(SETUP) install test
	$(RUN) -m effnb.book.workshop $(CHAPTERS)
	@$(if $(WHEELS),$(SETUP) wheels build/workshop/wheels)

data: ## rebuild the corpora from Debian's archive; only on Debian or Ubuntu, needs the network
	@$(SETUP) install data
	$(RUN) data/build_corpora.py

models: ## train the tokenizer, the small models and their twins again, from their checkpoints; takes hours
	@$(SETUP) install lab
	$(RUN) data/train_tokenizer.py
	for name in mini-300k mini-1m mini-5m; do $(RUN) data/train_models.py $$name || exit 1; done
	for name in retnet-300k rwkv-300k hyena-300k retnet-1m; do $(RUN) data/train_twins.py $$name --steps 2500 || exit 1; done
	$(RUN) -m effnb.lab.models --manifest

results: ## compute every stored result under data/results again, each by the command it names
	@$(SETUP) install test
	$(RUN) .make/results.py

bench: ## measure our speed beside the libraries that people would otherwise use, and print ratios
	@$(SETUP) install test
	$(RUN) -m pytest --numprocesses=0 --capture=no -m bench tests

test-gpu: ## prove the kernels on this machine's GPU, also for accesses out of bounds and races
	@$(SETUP) install test
	EFFNB_GPU=1 $(RUN) -m pytest --numprocesses=0 tests/kernels $(TEST_ARGS)
	EFFNB_GPU=1 $(RUN) .make/sanitize.py

bench-gpu: ## tune the kernels on this machine's GPU, measure them beside others', and store the table
	@$(SETUP) install peers
	$(RUN) -m effnb.kernels.bench --tune
	$(RUN) -m effnb.kernels.bench --gpu --store

bench-llama-cpp: ## measure decoding on this CPU beside llama.cpp's prebuilt binary, and store the table
	@$(SETUP) install lab
	npm install --prefix build/npm --ignore-scripts --omit=optional --no-audit --no-fund $$($(RUN) -m effnb.lab.llama_cpp)
	$(RUN) data/sweeps/05_inference/3_quantization.py decoding

check: ## lint, format, docstrings, spelling, and whether each chapter agrees with its source
	@$(SETUP) install test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m codespell_lib
	$(RUN) -m effnb.book.build --check

clean: ## remove the environment and the caches; data, checkpoints, your copies and everything in git stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
