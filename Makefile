# make demo   sets everything up and lets a Qwen3.5 model answer from a 3-bit cache
# make test   builds and runs all tests
# make quick  the tests that catch most mistakes, within a minute
# make check  format, lint and types
# make wheels the wheel, tried in a clean environment
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build/tests
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
OS := $(shell uname -s)
MLX_EXTRA := $(if $(filter Linux,$(OS)),$(if $(TURBOQUANT_CUDA),cuda13,cpu),)
# MLX's CPU wheel links the reference BLAS; OpenBLAS, where the system has it, multiplies float32 matrices 36 times faster.
BLAS = $(shell ldconfig -p 2>/dev/null | sed -n 's/.*=> \(.*libopenblas\.so\.0\)$$/\1/p' | head -n 1)
WITH_BLAS = $(if $(BLAS),LD_PRELOAD=$(BLAS))
DEBIAN := g++ make python3-venv python3-dev libopenblas0-pthread libgtest-dev libbenchmark-dev
# For the tests alone, and not needed: without Clang's sanitizers ctest skips metal_sanitized and says so.
DEBIAN_TESTS := clang libclang-rt-dev

.PHONY: demo test quick stress fuzz wheels environments check test-cpp test-python install system system-tests clean format api

demo: install
	$(WITH_BLAS) $(BIN)/python examples/run_qwen35_tq3.py

test: check install test-cpp test-python

# Debian's packages, only when one is missing; macOS brings a compiler and a BLAS, Homebrew the test library.
system:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ": make PYTHON=...")'
ifeq ($(OS),Darwin)
	@command -v brew >/dev/null && (brew list googletest >/dev/null 2>&1 || brew install -q googletest google-benchmark) || true
endif
ifeq ($(OS),Linux)
	@if command -v dpkg-query >/dev/null && ! dpkg-query -W $(DEBIAN) >/dev/null 2>&1; then \
	  $(SUDO) apt-get update -q && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -q $(DEBIAN); fi
endif

system-tests: system
ifeq ($(OS),Linux)
	@if command -v dpkg-query >/dev/null && ! dpkg-query -W $(DEBIAN_TESTS) >/dev/null 2>&1; then \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -q $(DEBIAN_TESTS) || true; fi
endif

$(BIN)/activate: | system
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# Everything the build needs is installed into the environment first: the extension must be built against the very MLX
# that will load it.
$(VENV)/.requirements: requirements.txt $(BIN)/activate
	$(BIN)/python -m pip install -q -r requirements.txt $(if $(MLX_EXTRA),"mlx[$(MLX_EXTRA)]==0.32.4")
	@touch $@

# mlx-vlm, for the tests that run it; without it they are skipped with the reason.
$(VENV)/.requirements-vlm: requirements-vlm.txt $(VENV)/.requirements
	$(BIN)/python -m pip install -q -r requirements-vlm.txt $(if $(MLX_EXTRA),"mlx[$(MLX_EXTRA)]==0.32.4")
	@touch $@

install: $(VENV)/.requirements
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .

test-cpp: $(VENV)/.requirements | system-tests
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset dev >/dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD)
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir $(BUILD) --output-on-failure -j 2

test-python: install $(VENV)/.requirements-vlm
	$(WITH_BLAS) $(BIN)/python -m pytest -n 2 --dist loadfile

# The long rows of the shared table take half of its time and rarely fail alone.
quick: install
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset dev >/dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(BUILD) --target turboquant_tests turboquant_mlx_tests
	$(BUILD)/tests/cpp/turboquant_tests --gtest_brief=1 --gtest_filter='-*N40001*:*N9000*:*N4100*:*N2049*'
	$(BUILD)/tests/cpp/turboquant_mlx_tests --gtest_brief=1
	$(WITH_BLAS) $(BIN)/python -m pytest -n 2 -m quick

# Random histories of caches, STRESS of each of two machines on each processor: some 40 operations each.
STRESS ?= 2000
stress: install
	rm -rf build/stress && mkdir -p build/stress
	$(WITH_BLAS) TURBOQUANT_NUM_THREADS=1 TURBOQUANT_STRESS=$(STRESS) TURBOQUANT_STRESS_PARTS=$$(nproc) \
	  TURBOQUANT_STRESS_REPORT=build/stress $(BIN)/python -m pytest -n $$(nproc) tests/python/test_stress*.py
	cat build/stress/*.txt | awk '/bound/ {if ($$1 > worst) worst = $$1; next} {n = $$1; $$1 = ""; sum[$$0] += n} \
	  END {for (name in sum) print sum[name] name; print worst " largest error of attention, of its bound"}' | sort -n

check: install
	$(BIN)/python -m ruff format --check . && $(BIN)/python -m ruff check .
	cp $$($(BIN)/python -c "import turboquant_mlx._core as c, pathlib; print(pathlib.Path(c.__file__).with_name('_core.pyi'))") python/turboquant_mlx/ && $(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu.h')

format:
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cu.h')
	$(BIN)/python -m ruff format . && $(BIN)/python -m ruff check --fix .

# The wheel of this Python and MLX, in dist/: repaired (libmlx.so stays MLX's own), then installed in an environment of its own,
# far from the repository, where a smoke test runs.
wheels: $(VENV)/.requirements
	$(BIN)/python tests/wheels.py dist

# What an installation says in environments that do not fit, and the oldest and newest versions of MLX and mlx-lm: an hour of
# building at most, in scratch environments; what they say goes to docs/environments.txt.
environments: $(VENV)/.requirements
	$(BIN)/python tests/environments.py | tee docs/environments.txt

# The pages of the Python API, from the docstrings, in build/api.
api: install
	$(BIN)/python -m pip install -q pdoc
	$(BIN)/python -m pdoc --docformat google -o build/api turboquant_mlx turboquant_mlx.calibration turboquant_mlx.eval

clean:
	rm -rf build $(VENV)
