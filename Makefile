# make book | test | processors | mutants | fuzz | kills | lab | notebooks | stamp | figure | reproduce | setup | clean
#
# Every target first installs the project into .venv, once: a stamp there depends on the pins.

FITS     := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON   ?= $(shell for one in python3.11 python3.12 python3.13 python3; do \
	$$one -c '$(FITS)' 2>/dev/null && { command -v $$one; exit; }; done; command -v python3)
VENV     ?= .venv
EXTRAS   ?= book,test
CHAPTERS ?= $(wildcard book/*.py)

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
BUILT := _build/.built
# What a page may depend on; the shell's find, since make's wildcard does not descend.
INPUTS := $(shell find book mlsae_core data benchmarks/*.json _config.yml _toc.yml -type f \
	-not -path 'data/store/*' -not -path '*/__pycache__/*' -not -path '*/.*' 2>/dev/null)

.DEFAULT_GOAL := book
.PHONY: setup book test processors mutants fuzz kills stamp lab notebooks figure reproduce clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and no python3 was found." \
	  "Install one (Debian: apt install python3-venv; conda: conda env create -f environment.yml)." >&2; exit 1; }
	@$(PYTHON) -c '$(FITS)' || { echo "Python 3.11, 3.12 or 3.13 is needed, for which the versions in" \
	  "constraints.txt are pinned; $(PYTHON) is `$(PYTHON) --version 2>&1`. Install one of them and run" \
	  "\`make PYTHON=/path/to/python ...\`, or use conda: conda env create -f environment.yml." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no module venv. Install it (Debian: apt install python3-venv)." >&2; exit 1; }
	@$(BIN)/python -c '$(FITS)' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned packages into $(VENV): one to three minutes, once."
	@# A recent pip unpacks faster; modules are compiled when they are first imported, not all now.
	@{ $(BIN)/python -m pip install -q --disable-pip-version-check "pip>=25" && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile --progress-bar off \
	    -c constraints.txt -e ".[$(EXTRAS)]"; } || { \
	  echo "The packages could not be installed: pip's reason stands above. Check the network (or" \
	  "set PIP_INDEX_URL to your mirror) and run the same command again; after a half-finished" \
	  "installation remove $(VENV) first." >&2; exit 1; }
	@touch $@

book: $(BUILT)
	@echo "The book is at _build/html/index.html"

# Outputs are taken from the notebooks where these are of today's code. `make book EXECUTE=1` executes
# all of them.
ifdef EXECUTE
.PHONY: $(BUILT)
export EXECUTE
endif

# After a failed build Sphinx would not read the unchanged pages again, and so would not warn again.
$(BUILT): $(STAMP) $(INPUTS)
	@test -e $@ -a -z "$(EXECUTE)" || rm -rf _build/.doctrees $(if $(EXECUTE),_build/.jupyter_cache)
	@rm -f $@
	@$(BIN)/jupyter-book build -n -W --keep-going book/ && $(BIN)/python -m mlsae_book.sphinx_ext || { \
	  $(BIN)/python -m pip check >/dev/null || echo "A package is missing: run \`rm -r $(VENV)\` and try again."; \
	  echo "The book was not built: the messages above say which page and why." >&2; exit 1; }
	@touch $@

TESTS ?= book/ tests/
test: $(STAMP)
	@$(BIN)/python -m pytest --nbval $(TESTS) $(ARGS)

# The same as on other processors, as far as switches of the libraries reach: one with AVX2 but
# without AVX-512 and two threads, one with neither and one thread.  `make processors TESTS=book/`
PROCESSORS ?= avx2 sse
avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell ARROW_USER_SIMD_LEVEL=AVX2 \
	NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" OMP_NUM_THREADS=2
sse := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem ARROW_USER_SIMD_LEVEL=NONE \
	NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL AVX512_SPR" OMP_NUM_THREADS=1

processors: $(STAMP)
	@status=0; $(foreach one,$(PROCESSORS),echo "As on a processor with $(one):"; \
	  $($(one)) $(BIN)/python -m pytest --nbval $(TESTS) $(ARGS) || status=1;) exit $$status

# Which mutants of the core its tests do not kill: of one in four places, an hour. Not in CI.
# MUTANTS="--every 40": minutes. MUTANTS="kernels pairs": of these modules.
MUTANTS ?=
mutants: $(STAMP)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[mutants]"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS)

# So many damaged and hostile inputs to every command: a quarter of an hour for the 2,000. Not in CI.
FUZZ ?= 2000
fuzz: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(FUZZ)

# Every command killed at random moments, so many runs of each, and what they end with: minutes.
KILLS ?= 15
kills: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/kills.py $(KILLS)

# Everything that is shipped, from nothing: hours. EXPERIMENTS=book/experiments/live.yml: a minute.
EXPERIMENTS ?= $(wildcard book/experiments/*.yml)
reproduce: $(STAMP)
	@$(BIN)/python -m mlsae_book reproduce $(EXPERIMENTS)

# The chapters to play with: a copy in lab/, so that what is tracked stays as it is.
lab: $(STAMP)
	@$(BIN)/python -m mlsae_book.lab $(ARGS)

# Fresh outputs for the notebook halves: text from x.py, outputs from running it.  Timings and
# widget state, which differ in every run, are left out.  `make notebooks CHAPTERS=book/intro.py`
notebooks: $(STAMP)
	@$(BIN)/jupytext --to ipynb --update $(CHAPTERS)
	@$(BIN)/jupyter nbconvert --to notebook --inplace --execute --log-level=WARN \
	  --ExecutePreprocessor.record_timing=False $(CHAPTERS:.py=.ipynb)
	@$(BIN)/jupyter nbconvert --to notebook --inplace --log-level=WARN \
	  --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_cell_metadata=False \
	  --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec \
	  --ClearMetadataPreprocessor.preserve_nb_metadata_mask=language_info \
	  --ClearMetadataPreprocessor.preserve_nb_metadata_mask=jupytext \
	  --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_all_outputs_tags=remove-output $(CHAPTERS:.py=.ipynb)
	@$(BIN)/python -m mlsae_book.execution $(CHAPTERS)

# Say that the stored outputs are of today's code, after every cell has given them once more.
stamp: $(STAMP)
	@$(BIN)/python -m pytest --nbval -q book/ && $(BIN)/python -m mlsae_book.execution

# The README's picture is the landing page's chart.
figure: $(STAMP)
	@$(BIN)/python -m mlsae_book.sphinx_ext figure

clean:
	rm -rf _build book/.ipynb_checkpoints .pytest_cache .ruff_cache
