# Every target sets up what it needs in VENV and builds the libraries first; nothing is installed outside this folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)

# Another torch for the whole set-up, e.g. TORCH_SPEC="torch==2.13.0"
TORCH_SPEC ?= torch torchvision
# Tests build the CUDA library wherever nvcc and a CUDA torch are found; the demo only where a GPU can use it.
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)
# Without a GPU to run it, the CUDA library is compiled for one architecture: that it compiles and links is what is tested.
export TORCH_CUDA_ARCH_LIST ?= $(if $(filter 1,$(GPU)),,9.0)
SOURCES := $(shell find csrc cmake CMakeLists.txt setup.py pyproject.toml -type f 2>/dev/null)

.PHONY: demo test test-all test-torch mutants bench gpu gpu-build gpu-test gpu-bench gpu-train lint format clean

$(VENV)/environment: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_SPEC)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check numpy "setuptools>=80" wheel "pybind11>=2.12" "cmake>=3.22" ninja \
	  torchvision "tyro>=0.9" tqdm safetensors matplotlib pillow
	touch $@

# The build for use: CUDA only where there is a GPU. The build for tests: with CUDA where it compiles, and the emulation.
$(VENV)/built: $(VENV)/environment $(SOURCES)
	FGVC_EXT_CUDA=$(if $(filter 1,$(GPU)),,0) $(BIN)/python setup.py develop
	touch $@

# Where the CUDA library is built, also what reads its machine code: nvidia-cuda-cuobjdump, which calls nvdisasm.
$(VENV)/test-environment: $(VENV)/environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pytest pytest-xdist pytest-timeout hypothesis build timm scipy
	if { command -v nvcc || test -x "$(CUDA_HOME)/bin/nvcc"; } >/dev/null && [ "$(FGVC_EXT_CUDA)" != 0 ]; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm; fi
	touch $@

$(VENV)/built-for-tests: $(VENV)/test-environment $(SOURCES)
	FGVC_EXT_CMAKE_ARGS="-DFGVC_EXT_EMULATION=ON" $(BIN)/python setup.py develop
	touch $@ $(VENV)/built

demo: $(VENV)/built
	$(BIN)/fgvc-ext demo --out runs/demo $(ARGS)

test: $(VENV)/built-for-tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow" $(ARGS)

test-all: $(VENV)/built-for-tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# The libraries built above, unchanged, under another torch in an environment of its own: make test-torch TORCH=2.13.0
test-torch: $(VENV)/built-for-tests
	@test -n "$(TORCH)" || { echo "usage: make test-torch TORCH=2.13.0"; exit 2; }
	test -x .venv-torch-$(TORCH)/bin/python || $(PYTHON) -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) numpy pytest pytest-xdist pytest-timeout hypothesis setuptools
	PYTHONPATH="$(CURDIR)" .venv-torch-$(TORCH)/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "not slow" python_tests/ops $(ARGS)

# Small changes of the sources, one at a time, that the tests must notice: some hours, and where it was stopped it goes on.
mutants: $(VENV)/built-for-tests
	$(BIN)/python -m python_tests.mutants.run $(ARGS)

bench: $(VENV)/built
	$(BIN)/python benchmarks/run.py $(ARGS)

# On a machine with a GPU, each part under 8 minutes, results into benchmarks/results/ as they come. Where nothing can be
# installed, name an interpreter that has torch, pytest, hypothesis, pybind11, cmake and ninja: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu: gpu-build
	status=0; for part in gpu-test gpu-bench gpu-train; do $(MAKE) --no-print-directory $$part || status=1; done; exit $$status

# A build that is stopped goes on at the next call where it was.
gpu-build: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/test-environment)
	FGVC_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=native timeout 470 $(GPU_PYTHON) setup.py build_ext --inplace

gpu-test:
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) benchmarks/gpu.py ceilings test sanitize

gpu-bench:
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) benchmarks/gpu.py bench

gpu-train:
	PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) benchmarks/gpu.py train

lint: $(VENV)/environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ruff mypy clang-format
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'docs/examples/*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ruff clang-format
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'docs/examples/*.cpp' | xargs $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info fgvc_ext/lib fgvc_ext/_C*.so compile_commands.json $(VENV) .venv-torch-*
