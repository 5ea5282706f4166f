# Each target works on a fresh machine with Python >= 3.10 and a C++ compiler, and does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTHON_SOURCES := .
KERNEL_TESTS := tests/test_sampler_step.py tests/test_random.py

.PHONY: demo test bench lint build wheel sanitize test-torch-compat clean

demo: build
	$(PY) -m genfast demo

test: lint build
	$(PY) -m pytest -q -n 2 tests

bench: build
	$(PY) -m benchmarks

# torch comes first and alone: asked for by another package, a looser version would bring gigabytes of CUDA with it.
$(VENV)/.tools: constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -r requirements-dev.txt
	touch $@

$(VENV)/.installed: $(VENV)/.tools setup.py pyproject.toml
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Editable, so only the native modules can be stale; ninja rebuilds what changed.
build: $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace

lint: $(VENV)/.tools
	$(VENV)/bin/ruff check -q $(PYTHON_SOURCES)
	$(VENV)/bin/ruff format -q --check $(PYTHON_SOURCES)
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

wheel: $(VENV)/.tools
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the native modules. The sanitizers' runtime
# must be the first library of the process; leaks are not looked for, since the interpreter leaks by design.
SANITIZED := build/sanitized
sanitize: $(VENV)/.tools
	rm -rf $(SANITIZED)
	GENFAST_SANITIZE=address,undefined $(PY) setup.py -q build --build-lib $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 PYTHONPATH=. \
	$(CURDIR)/$(VENV)/bin/pytest -q -p no:cacheprovider -k "not two_to_the_31" $(addprefix $(CURDIR)/,$(KERNEL_TESTS))

# The modules built in .venv, imported unchanged by another torch.
OLD_TORCH ?= 2.9.1
COMPAT := .venv-compat
test-torch-compat: build
	test -x $(COMPAT)/bin/python || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python -m pip install -q "torch==$(OLD_TORCH)" numpy pytest hypothesis
	rm -rf build/compat && mkdir -p build/compat && cp -rL genfast build/compat/genfast
	cd build/compat && PYTHONPATH=. $(CURDIR)/$(COMPAT)/bin/pytest -q -p no:cacheprovider \
	$(addprefix $(CURDIR)/,$(KERNEL_TESTS))

clean:
	rm -rf build dist *.egg-info genfast/_c*.so genfast/_build_info.json
