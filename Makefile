# make demo          set up, then train a small model, score it and talk to it
# make test          set up, then style, types, import floors and tests
# make lattice       only the laws across rooms: layouts drawn by the hundred, and what they covered
# make gpu           the tests that need a GPU, then what a step costs on it
# make peers         the same training in DeepSpeed and here, side by side (installs DeepSpeed)
# make papers        measure what the papers state, and write docs/papers.md (TOPICS="zero lora": only these)
# make book          measure a chapter of the book again and draw its figures: make book CHAPTER=00; without, all
# make weave         cut the code and numbers in the book's lessons anew, in seconds; say what is no longer true
# make survive       kill -9 a small run at N random moments, and see that it loses nothing
# make options       write docs/options.md anew from the code
# make clean         remove the environment and what tools have cached
#
# VENV=.venv         where the environment goes; empty: the Python on the path, as it is
# PYTHON=python3     which Python makes it (3.10 or later; else the first fitting one on the path)
# N=50               draws per drawn test, or kills       ARGS="..."   further words for the demo, or for pytest

.DEFAULT_GOAL := help
.PHONY: help demo test lattice gpu peers papers book weave survive options clean runtime developer
VENV ?= .venv
N ?= 50
ARGS ?=
candidates := python3 python python3.14 python3.13 python3.12 python3.11 python3.10
fits := -c 'import sys; sys.exit(sys.version_info < (3, 10))'
PYTHON ?= $(shell for p in $(candidates); do $$p $(fits) 2>/dev/null && { echo $$p; break; }; done)
bin := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(if $(VENV),$(VENV)/$(bin)/python,$(PYTHON))
BOOTSTRAP := $(PYTHON) tools/bootstrap.py "$(VENV)"

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: runtime
	$(RUN) -m minispeed demo $(ARGS)

test: developer
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()" --no-logo
	$(RUN) -m pytest -n auto --dist worksteal --examples $(N) $(ARGS)

N_LATTICE := $(if $(filter command line environment,$(origin N)),$(N),1000)
lattice: developer
	$(RUN) -m pytest tests/laws --timeout 0 --examples $(N_LATTICE) $(ARGS)

gpu: developer
	@if $(RUN) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(RUN) -m pytest -m gpu --examples $(N) $(ARGS) && $(RUN) benchmarks/gpu_step.py; \
	else \
		echo "minispeed: torch sees no GPU here, so there is nothing for make gpu to test or to measure."; \
	fi

peers: developer
	@$(BOOTSTRAP) peers
	$(RUN) -m pytest tests/peers tests/test_examples.py $(ARGS)

TOPICS ?= zero offload mixed_precision pipelines tensor attention sequence lora deep onebit
papers: runtime
	@set -e; for topic in $(TOPICS); do $(RUN) benchmarks/papers/$$topic.py; done
	$(RUN) benchmarks/papers/page.py

book: developer
	@test -n "$(wildcard tutorials/$(CHAPTER)*/run.py)" || { echo "minispeed: there is no chapter $(CHAPTER)" >&2; exit 1; }
	@set -e; for run in $(wildcard tutorials/$(CHAPTER)*/run.py); do echo $$run; $(RUN) $$run; done
	$(RUN) tutorials/weave.py

weave: developer
	$(RUN) tutorials/weave.py $(ARGS)

survive: runtime
	$(RUN) tools/survive.py $(N) $(ARGS)

options: runtime
	$(RUN) -m minispeed --options > docs/options.md.new
	mv docs/options.md.new docs/options.md

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info

runtime developer:
	@test -n "$(PYTHON)" || { echo "minispeed: needs Python 3.10 or later, and none is on the path." \
		"Install one, or name it: make demo PYTHON=/where/it/is/python3" >&2; exit 1; }
	@$(BOOTSTRAP) $(if $(filter developer,$@),figures eval dev,$(if $(VENV),figures eval))
