# make demo: the whole chain on a CPU. make test: lint and tests. Both install into .venv first. Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
HALF = OMP_NUM_THREADS=$(shell $(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')

.PHONY: install demo demo-favae demo-vavae demo-generator demo-reconstruction test format clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: favae needs Python 3.10 or newer')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[compression,offline,test]"
	touch $@

# An interrupted demo continues where it was. The two tokenizers train side by side, each on half of the cores, and so do the
# generator and the measurements of the tokenizers. The page is written after each stage.
demo: install
	mkdir -p $(DEMO)
	@echo "demo: training two tokenizers; see $(DEMO)/favae/samples and $(DEMO)/vavae/samples meanwhile"
	$(MAKE) --no-print-directory --jobs 2 demo-favae demo-vavae
	$(MAKE) --no-print-directory --jobs 2 demo-generator demo-reconstruction
	$(BIN)/favae evaluate generation --pipeline $(DEMO)/generator/final --reference photos \
		--num-images 180 --num-inference-steps 20 --guidance-scale 1.5 \
		--features efficientnet-lite0 --output $(DEMO)/generation
	$(BIN)/favae report $(DEMO)

demo-favae:
	$(HALF) $(BIN)/python train_tokenizer.py configs/tokenizer/photos_favae.yaml output=$(DEMO)/favae

demo-vavae:
	$(HALF) $(BIN)/python train_tokenizer.py configs/tokenizer/photos_vavae.yaml output=$(DEMO)/vavae \
		2> $(DEMO)/vavae.log || { tail -n 1 $(DEMO)/vavae.log >&2; exit 1; }

demo-generator:
	$(HALF) $(BIN)/favae cache-latents --tokenizer $(DEMO)/favae/final --data photos --resolution 64 --output $(DEMO)/latents
	$(HALF) $(BIN)/python train_generator.py configs/generator/photos_lightningdit.yaml \
		data.latents=$(DEMO)/latents data.tokenizer=$(DEMO)/favae/final output=$(DEMO)/generator

demo-reconstruction:
	for split in heldout validation; do $(HALF) $(BIN)/favae evaluate reconstruction \
		--model vavae=$(DEMO)/vavae/final --model favae=$(DEMO)/favae/final --data photos:$$split --resolution 64 \
		--features efficientnet-lite0 --output $(DEMO)/reconstruction-$$split 2> $(DEMO)/reconstruction.log || { tail -n 1 $(DEMO)/reconstruction.log >&2; exit 1; }; done
	$(BIN)/favae report $(DEMO)

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n 2 --dist worksteal

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs
