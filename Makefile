# make demo          the whole way on generated scenes, 12 to 18 minutes on two cores
# make demo-seeds    the same comparison over three seeds          make demo-teacher   make the shipped teacher again
# make serve         the demo's student and teacher, with a page at http://127.0.0.1:8000
# make earthgpt      EarthGPT's tower and its two stages           make towers         the same with CLIP's tower, compared
# make doctor        is this machine, or RAY_ADDRESS's cluster, fit for a run?
# make test          the tests                                     make lint           ruff and mypy       make audit  known vulnerabilities
# make bench         losses and a step against TRL's and MiniLLM's, compared with the committed ratios
# make test-all      and the long ones: 10,000 images, every ZeRO stage, every fault, killed sweeps, bf16, EarthGPT, stored features
PYTHON ?= python3
ARGS ?=
export RAY_ADDRESS ?= local
PY = .venv/bin/python

.PHONY: demo serve doctor demo-seeds demo-teacher earthgpt towers bench test test-all lint audit clean

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; try: make PYTHON=python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(PY) jobs/pipeline.py --config configs/demo.yaml $(ARGS)

serve: .venv/installed
	.venv/bin/serve run serving.app:build student=runs/demo/distill/model teacher=runs/demo/teacher/model $(ARGS)

demo-seeds: demo
	$(PY) jobs/seeds.py --config configs/demo.yaml $(ARGS)

demo-teacher: .venv/installed
	$(PY) jobs/pretrain.py --config configs/demo-teacher.yaml $(ARGS)
	$(PY) jobs/prepare.py --config configs/demo-teacher.yaml $(ARGS)
	$(PY) jobs/finetune.py --config configs/demo-teacher.yaml role=teacher $(ARGS)
	@echo "made runs/demo-teacher/teacher/model; copy it to configs/demo-teacher to ship it"

earthgpt: .venv/installed
	$(PY) jobs/pretrain.py --config configs/earthgpt.yaml $(ARGS)
	$(PY) jobs/prepare.py --config configs/earthgpt.yaml $(ARGS)
	$(PY) jobs/prepare.py --config configs/earthgpt.yaml 'data.shards=$${run}/general' data.seed=1 data.train=3840 data.test=0 $(ARGS)
	$(PY) jobs/finetune.py --config configs/earthgpt.yaml role=blind $(ARGS)
	$(PY) jobs/finetune.py --config configs/earthgpt.yaml role=teacher 'teacher.model.init=$${run}/blind/model' $(ARGS)
	$(PY) jobs/evaluate.py --config configs/earthgpt.yaml $(ARGS)

towers: earthgpt
	$(PY) jobs/towers.py --config configs/earthgpt.yaml $(ARGS)

doctor: .venv/installed
	$(PY) jobs/doctor.py --config $(or $(CONFIG),configs/demo.yaml) $(ARGS)

bench: .venv/installed
	$(PY) jobs/benchmark.py loss --config configs/demo.yaml $(ARGS)
	$(PY) jobs/benchmark.py distill quick --config configs/demo.yaml $(ARGS)
	$(PY) jobs/benchmark.py compare --config configs/demo.yaml $(ARGS)

test: .venv/installed
	$(PY) -m pytest

test-all: .venv/installed
	$(PY) -m pytest -m ''

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

audit: .venv/installed
	$(PY) infra/audit.py

clean:
	rm -rf .venv runs
