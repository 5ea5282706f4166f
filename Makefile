# Each target works on a fresh machine with Python >= 3.10 and a C++ compiler, and does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install -q --disable-pip-version-check
# Newer than the one that CUDA builds of torch 2.13 ask for, hence put in by itself: the interpreter of earlier ones
# rounds a fused multiply-add twice, and without a GPU the tests of the Triton kernels would have to be skipped.
# Python 3.10 gets the last one that supports it.
TRITON := "triton==3.9.0; python_version >= '3.11'" "triton==3.8.0; python_version < '3.11'"
# By itself too: of what it asks for (torchvision, wandb, kornia, ...), the samplers need next to nothing.
K_DIFFUSION := k-diffusion==0.1.1.post1
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
KERNEL_TESTS := $(addprefix $(CURDIR)/tests/test_,sampler_step.py random.py token_sampling.py token_transfer.py \
	token_head.py token_transition.py token_masking.py \
	attention.py attention_cached.py attention_mask.py \
	vector_quantize.py vector_quantize_cpu.py code_update.py residual_quantize.py scalar_quantize.py gradient_bucket.py)

.PHONY: demo test bench lint build wheel sanitize test-torch-compat clean

demo: build
	$(PY) -m genfast demo

test: lint build
	$(PY) -m pytest -q -n 2 tests

bench: build
	$(PY) -m benchmarks

# torch comes first and alone: asked for by another package, it could come in another version.
$(VENV)/.torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) $(PIP_INSTALL) --upgrade pip
	$(PY) $(PIP_INSTALL) -c constraints.txt torch
	touch $@

$(VENV)/.tools: $(VENV)/.torch constraints.txt requirements-dev.txt
	$(PY) $(PIP_INSTALL) -c constraints.txt torch -r requirements-dev.txt
	$(PY) $(PIP_INSTALL) --no-deps $(TRITON) $(K_DIFFUSION)
	touch $@

$(VENV)/.installed: $(VENV)/.tools setup.py pyproject.toml
	$(PY) $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	touch $@

# Editable, so only the native modules can be stale; ninja rebuilds what changed.
build: $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace

lint: $(VENV)/.tools
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

wheel: $(VENV)/.tools
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

# The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer in the native modules, which GCC builds. The
# sanitizers' runtime must be the first library of the process; leaks are not looked for, since the interpreter leaks
# by design. 2^31 elements do not fit beside the shadow memory.
SANITIZED := build/sanitized
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
UNDER_SANITIZER = cd $(SANITIZED) && PYTHONPATH=. LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 $(CURDIR)/$(PY)
sanitize: $(VENV)/.tools
	rm -rf $(SANITIZED)
	CXX="$(CXX)" GENFAST_SANITIZE=address,undefined $(PY) setup.py -q build --build-lib $(SANITIZED)
	$(UNDER_SANITIZER) -c "from genfast import backends as b; assert b.build_info()['sanitize'] and b.cpu_isa()"
	$(UNDER_SANITIZER) -m pytest -q -p no:cacheprovider -k "not two_to_the_31" $(KERNEL_TESTS)

# The modules built in .venv, imported unchanged by the oldest torch that the package accepts. Where pip's index has no
# CPU build of it (PIP_INDEX_URL chooses another), its CUDA libraries come too: 5 GB in all.
OLD_TORCH ?= 2.7.1
COMPAT := .venv-compat
OLD_PY := $(CURDIR)/$(COMPAT)/bin/python
$(COMPAT)/.torch-$(OLD_TORCH):
	test -x $(OLD_PY) || $(PYTHON) -m venv $(COMPAT)
	$(OLD_PY) $(PIP_INSTALL) "torch==$(OLD_TORCH)" numpy pytest hypothesis scipy tqdm
	rm -f $(COMPAT)/.torch-* && touch $@

# The samplers too: they are what a change in torch's Python side would reach.
test-torch-compat: build $(COMPAT)/.torch-$(OLD_TORCH)
	rm -rf build/compat && mkdir -p build/compat && cp -rL genfast build/compat/genfast
	cd build/compat && PYTHONPATH=. $(OLD_PY) -c "from genfast import backends as b; assert b.cpu_isa(), b.cpu_missing()"
	cd build/compat && PYTHONPATH=. $(OLD_PY) -m pytest -q -p no:cacheprovider $(KERNEL_TESTS) \
	$(CURDIR)/tests/test_samplers.py

clean:
	rm -rf build dist *.egg-info genfast/_c*.so genfast/_build_info.json
