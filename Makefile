# make demo   search a cell on handwritten digits, train it, report its accuracy (2 minutes)
# make test   run the tests
# make crash  kill runs at random moments, many times
# make cuda   run whole scripts on a GPU that is not there (see tests/test_null_gpu.py)
# All make the virtual environment .venv first and install what they need into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test crash cuda clean

demo: $(VENV)/installed
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S); set -ex; \
	$(BIN)/python search.py --dataset digits --init_channels 8 --layers 3 --batch_size 32 \
	    --epochs 10 --learning_rate 0.0125 --arch_learning_rate 0.01 --save $$run/search; \
	$(BIN)/python train.py --arch $$run/search/genotype.json --dataset digits \
	    --init_channels 8 --layers 5 --batch_size 32 --epochs 12 --learning_rate 0.0083 \
	    --save $$run/train

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not crash and not cuda"

crash: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 -m crash -o faulthandler_timeout=1800

cuda: $(VENV)/installed-dev
	$(BIN)/python -m pytest -rs -m cuda

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis
