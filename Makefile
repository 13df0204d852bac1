# What people run most. Needs Linux, make and Python 3.11 or newer; everything else goes to .venv.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
RUN = $(VENV)/bin/python

.PHONY: install demo pipeline test test-all bench lint

demo: override CONFIG = configs/demo.py
demo: pipeline

pipeline: $(VENV)/core
	$(RUN) pipeline.py $(CONFIG)

test: $(VENV)/dev
	$(RUN) -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(VENV)/dev
	$(RUN) -m pytest -n auto --dist worksteal

bench: $(VENV)/dev
	$(RUN) -m benchmarks.cpu
	test -z "$$DATA" || for name in data sft dpo; do $(RUN) -m benchmarks.$$name || exit; done

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

install: $(VENV)/dev

# An environment counts as made once its stamp is there: an interrupted installation is continued.
$(VENV)/core: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python " + sys.version.split()[0] + \
	  " found, 3.11 or newer needed; name one with make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/core
	$(RUN) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@
