# make train | test | thorough | lint | bench. The first use sets up .venv (about a minute); later uses go straight to work.
PYTHON ?= python3
# Where to take torch from, if not from pip's usual place: the address of PyTorch's own wheels for CPU or for one CUDA version.
TORCH_INDEX ?=
RUN ?= runs/default

BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test thorough lint bench clean
setup: $(READY)

$(READY): pyproject.toml configs/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "emformer needs Python 3.11 or newer; '$(PYTHON)' is older: make PYTHON=python3.12 …"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q -c configs/constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -q -c configs/constraints.txt -e '.[dev]'
	@touch $@

# Starts the default run, or continues it where it was stopped.
train: $(READY)
	@$(BIN)/emformer fit -c configs/default.yaml --run $(RUN) --resume

# Two processes of one thread each, where there are two cores: most tests are small.
test: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# With all of the 2,000 damaged files, of which `make test` tries a tenth, and all traced variants, of which it takes a fifth.
thorough: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --thorough -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/ty check emformer train

bench: $(READY)
	@$(BIN)/python -m tests.bench

clean:
	rm -rf .venv runs data/cache
