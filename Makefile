# make demo: the whole chain on a CPU. make test: lint and tests. Both install into .venv first. Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
PHOTOS := --resolution 64 --features efficientnet-lite0

.PHONY: install demo test format clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: favae needs Python 3.10 or newer')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[offline,test]"
	touch $@

# Each line is a command of its own; an interrupted demo goes on where it was.
demo: install
	$(BIN)/python train_tokenizer.py configs/tokenizer/photos_favae.yaml output=$(DEMO)/favae
	$(BIN)/python train_tokenizer.py configs/tokenizer/photos_vavae.yaml output=$(DEMO)/vavae
	$(BIN)/favae cache-latents --tokenizer $(DEMO)/favae/final --data photos --resolution 64 --output $(DEMO)/latents
	$(BIN)/python train_generator.py configs/generator/photos_lightningdit.yaml \
		data.latents=$(DEMO)/latents data.tokenizer=$(DEMO)/favae/final output=$(DEMO)/generator
	$(BIN)/favae evaluate reconstruction --model vavae=$(DEMO)/vavae/final --model favae=$(DEMO)/favae/final \
		--data photos:heldout $(PHOTOS) --output $(DEMO)/reconstruction
	$(BIN)/favae evaluate reconstruction --model vavae=$(DEMO)/vavae/final --model favae=$(DEMO)/favae/final \
		--data photos:validation $(PHOTOS) --output $(DEMO)/reconstruction_validation
	$(BIN)/favae evaluate generation --pipeline $(DEMO)/generator/final --reference photos \
		--num-images 270 --num-inference-steps 20 --guidance-scale 1.5 \
		--features efficientnet-lite0 --output $(DEMO)/generation
	$(BIN)/favae report $(DEMO)

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs
