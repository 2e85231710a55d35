PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
GRAM_STEPS := 0,3,10,18,28,37,44,48  # as --budget 8 finds them in minutes
CLIPS := -p "a smiling person in a blue cardigan with a ginger bun and a moustache on a yellow background , becomes angry" \
	-p "a laughing person in a purple tee with brown skin and cropped black hair , moves left"

.PHONY: help demo demo-pictures demo-clips clips-gram test test-slow models models-full check types wheel eval quality bench engines sizes static soak fits serve-bench gpu reference clean

help:  ## Say what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml reference/models/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,compile,rtx,pictures,hub,serve,dev]' --editable ./reference/models
	touch $(READY)

demo: demo-pictures demo-clips  ## Two sheets of avatars, with seconds and dB: demo/comparison.png and demo/clips.png
	@echo "Both sheets are in demo/. A server for the openai client, and a page: $(BIN)/cachec serve demo/tiny-flux-lesa.cachec"

demo-pictures: $(READY)  ## tiny-flux with LESA and with gram in bundles that need nothing else: demo/comparison.png
	$(BIN)/cachec compile tiny-flux --method lesa --interval 7 -o demo/tiny-flux-lesa.cachec --force
	$(BIN)/cachec compile tiny-flux --method gram --schedule $(GRAM_STEPS) -o demo/tiny-flux-gram.cachec --force
	$(BIN)/cachec run demo/tiny-flux-lesa.cachec --compare --beside demo/tiny-flux-gram.cachec --force -o demo/comparison.png \
		-p "a winking face in a purple turtleneck with short ginger hair on a pink background" \
		-p "a surprised person with a white bun in a white tee on a green background" \
		-p "a sad person with light skin , spiky black hair and a beard in a red turtleneck"
	$(BIN)/cachec run demo/tiny-flux-lesa.cachec --force -o demo/alone.png -p "an angry character wearing a black tee , with brown skin and no hair"

demo-clips: $(READY)  ## tiny-hunyuan with TaylorSeer, distilled, and with DisCa on that, rows of frames: demo/clips.png
	$(BIN)/cachec compile tiny-hunyuan --method taylor --budget 10 -o demo/tiny-hunyuan-taylor.cachec --force
	$(BIN)/cachec compile tiny-hunyuan-8 --method disca --schedule disca-4 -o demo/tiny-hunyuan-disca.cachec --force
	$(BIN)/cachec run demo/tiny-hunyuan-taylor.cachec --compare --beside demo/tiny-hunyuan-disca.cachec --force \
		-o demo/clips.png $(CLIPS)

clips-gram: demo-clips  ## The same with a row of gram, which calibrates for minutes
	$(BIN)/cachec compile tiny-hunyuan --method gram --budget 8 -o demo/tiny-hunyuan-gram.cachec --force
	$(BIN)/cachec run demo/tiny-hunyuan-taylor.cachec --compare --beside demo/tiny-hunyuan-gram.cachec --force -o demo/clips.png $(CLIPS)

test: $(READY)  ## Run the tests, on the CPU, in two processes of one thread each
	$(BIN)/python -m pytest -n 2 --dist loadscope --durations 10

models: $(READY)  ## Every family's small pipeline through capture, engines, sizes, drop-in and TensorRT for RTX: a table, five minutes
	$(BIN)/python -m bench.models

models-full: $(READY)  ## Capture every family at full size, without weights: a table in docs/models.md
	$(BIN)/python -m bench.models_full

test-slow: $(READY)  ## Run the tests that build for minutes: TensorRT for RTX on tiny-flux, workers on Ray, the benches' own
	$(BIN)/python -m pytest -n 2 --dist loadscope -m slow

check: $(READY) types  ## Format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=.types $(BIN)/mypy -m cachec -m cachec.cli -p cachec.compiler -p cachec.passes -p cachec.pictures -p cachec.engines -p cachec.runtime -p cachec.serving

types:  # type checkers cannot follow the editable install: give them a folder of the right name
	@mkdir -p .types && ln -sfn .. .types/cachec

wheel: export PYTHONDONTWRITEBYTECODE =  # what is not compiled while it is installed is, once, when it is imported
wheel: $(READY)  ## Build the wheel, install it in clean venvs, run the smoke tests against it
	rm -rf dist build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --no-compile "$$(ls dist/*.whl)[cpu,compile]" pytest
	cp -r tests build/wheel/tests && cp pyproject.toml build/wheel/
	cd build/wheel && venv/bin/python -m pytest -m smoke --basetemp made $$(grep -rl "mark.smoke" tests --include "test_*.py")
	$(PYTHON) -m venv build/wheel/bare
	build/wheel/bare/bin/python -m pip install --quiet dist/*.whl
	build/wheel/bare/bin/cachec compile tiny-flux > build/wheel/bare.log 2>&1; test $$? -eq 4
	grep -q "pip install 'cachec\[compile\]'" build/wheel/bare.log
	build/wheel/bare/bin/python -m pip install --quiet "$$(ls dist/*.whl)[pictures]"
	build/wheel/bare/bin/cachec run build/wheel/made/shared/lesa.cachec -p "a smiling face with short blue hair" -o build/wheel/face.png

eval: $(READY)  ## The honest table: gram with 8 of 50 steps beside everything, demo/eval.json
	$(BIN)/cachec compile tiny-flux --method gram --budget 8 -o demo/tiny-flux-gram.cachec --force
	$(BIN)/cachec eval demo/tiny-flux-gram.cachec --against taylor:1,taylor:2,lesa,reuse,plain,ab2,unipc,dpm \
		--json demo/eval.json --force

quality: $(READY)  ## Every method at equal cost on the reference models: bench/QUALITY.md (hours on two cores; resumable)
	printf '%s\n' tiny-qwen tiny-hunyuan tiny-flux | OMP_NUM_THREADS=1 xargs -P 2 -I{} \
		$(BIN)/python -m bench.quality --work build/quality --model {}
	$(BIN)/python -m bench.quality_report --date $$(date +%F)

bench: $(READY)  ## Speed beside the peers in one run: bench/RESULTS.md (a good hour on two idle cores)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,compile,rtx,pictures,hub,serve,dev,bench]'
	$(BIN)/python -m bench.speed

engines: $(READY)  ## Engines of TensorRT for RTX and errors of low precision: bench/ENGINES.md (a quarter of an hour)
	$(BIN)/python -m bench.engines

sizes: $(READY)  ## Compile models of FLUX.1-dev's width and depth: bench/SIZES.md (50 GB of disk, half an hour)
	$(BIN)/python -m bench.sizes

static: $(READY)  ## What engines for one size gain over one set for all: the end of bench/SIZES.md
	$(BIN)/python -m bench.static

soak: $(READY)  ## Damage bundles, kill commands, ask a server anything, thousands of times: docs/reliability.md
	$(BIN)/python -m bench.soak

serve-bench: $(READY)  ## The server against other ways to batch: bench/SERVING.md (about an hour on two idle cores; --plan says; resumable)
	$(BIN)/python -m bench.serving
	$(BIN)/python -m bench.serving --model flux-shaped

fits: $(READY)  ## What calibration and training cost, and LESA from some of the tokens: bench/FITS.md (half an hour)
	$(BIN)/python -m bench.fits

gpu:  ## On a machine with a GPU: build, compare with eager, measure; bench/gpu.json. Uses PYTHON, which has torch and diffusers
	$(PYTHON) -m bench.gpu_check --out bench/gpu.json

reference: $(READY)  ## Train the reference models of avatars: Node draws the pictures; resumable, checkpoints in build/reference
	for part in dataset clips; do $(BIN)/python -m reference.avatars.$$part || exit; done
	for part in autoencoder tiny_flux qwen_autoencoder tiny_qwen video_autoencoder tiny_hunyuan; do \
		$(BIN)/python -m reference.avatars.$$part --threads 2 || exit; done
	for kind in pictures clips; do $(BIN)/python -m reference.avatars.probe --of $$kind --threads 2 || exit; done
	$(BIN)/python -m reference.avatars.plot_loss

clean:  ## Remove what was built, but not what was trained (build/reference)
	rm -rf $(filter-out build/reference,$(wildcard build/*))
	rm -rf dist demo .mypy_cache .ruff_cache .pytest_cache *.egg-info
