# Every target is one line over `umm-kit`, pytest or a standard tool, so that README.md can give the same line for Windows.
#   make reproduce TORCH_INDEX=URL    take torch from another wheel source (a CPU or a CUDA build); an installed torch is kept
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: reproduce test test-fast lab notebooks figures benchmarks clean .venv

reproduce: .venv  ## run every notebook on the shipped models and compare what comes out with what is claimed
	$(BIN)/umm-kit reproduce

test: .venv  ## lint, types, every test
	$(BIN)/ruff check && $(BIN)/mypy && $(BIN)/pytest -n 2 --dist loadfile

test-fast: .venv  ## lint and the quick tests
	$(BIN)/ruff check && $(BIN)/pytest -m "not (slow or distributed or notebook or browser)"

lab: .venv  ## read and run the notebooks
	$(BIN)/jupyter lab notebooks

notebooks: .venv  ## run notebooks/source/*.py and refresh the committed notebooks with their outputs
	$(BIN)/umm-kit notebooks

figures: .venv  ## redraw figures/ from recorded numbers
	$(BIN)/umm-kit figures

benchmarks: .venv  ## timed comparisons
	$(BIN)/pytest benchmarks -s

clean:  ## remove what the other targets made; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv: .venv/installed

# Torch goes first and alone, so that TORCH_INDEX concerns nothing else. Every step is skipped by pip where it is done already.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit('umm_kit needs Python 3.11 or newer, and $(PYTHON) is %d.%d: run make PYTHON=/path/to/python3.11' % v[:2] if v < (3, 11) else 0)"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[notebooks,dev]"
	@touch $@
