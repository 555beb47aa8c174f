# `make demo` and `make test` do everything on a machine with Python 3.11 or newer, make and gcc.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
# The newest tested interpreter that is there; override with `make PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS := train,sim,driving,rlds,beam,formats,trackers,tracing,dev
# These six declare bounds that rule out a current stack although they work with it: gym-pusht wants the OpenCV build that
# needs a display, gym-aloha wants dm_control (only its model files are used), gymnasium-robotics takes MuJoCo 4, on which
# Fetch fails, openpi-client wants numpy<2, apache-beam wants older numpy, protobuf, pyarrow and pillow (whose resizing
# differs by a level from that of the pinned one), highway-env a fork of pygame that cannot stand beside it.
NO_DEPS := gym-pusht gym-aloha gymnasium-robotics openpi-client apache-beam highway-env
# So does robosuite, of `make arms`: it wants packages that are compiled, for keyboards, and the same OpenCV. 1.5.2 wants
# numpy<2.
ARMS_NO_DEPS := robosuite==1.5.1
define LIST_REQUIREMENTS
import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; extras = p["optional-dependencies"]; \
print(*p["dependencies"], *(r for e in "$(EXTRAS)".split(",") for r in extras[e]), sep="\n")
endef

.PHONY: setup arms ray demo demo-driving benchmark compare transfer chunking test lint constraints clean
setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or run: make PYTHON=/path/to/python3"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep -o '^pip==[0-9.]*' constraints.txt)"  # older ones refuse hashes in constraints
	$(PY) -c '$(LIST_REQUIREMENTS)' > $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --requirement $(VENV)/requirements.txt editables
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps $(NO_DEPS)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .  # a folder has no hash to check
	@touch $@

# More simulated robots: robosuite's arms, which take half a gigabyte.
arms: private EXTRAS := arms
arms: setup
	$(PY) -c '$(LIST_REQUIREMENTS)' > $(VENV)/requirements-arms.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --requirement $(VENV)/requirements-arms.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --no-deps $(ARMS_NO_DEPS)

# Ray Serve, for serve/deploy/ray_serve.py and its test.
ray: private EXTRAS := ray
ray: setup
	$(PY) -c '$(LIST_REQUIREMENTS)' > $(VENV)/requirements-ray.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --requirement $(VENV)/requirements-ray.txt

# The main job, end to end: demonstrations, statistics, pretraining, fine-tuning, serving, closed loop, report.
# It can be stopped at any moment and goes on where it was. DEMO_SCALE=full does a longer run.
demo: setup
	$(PY) train/demo.py --scale $${DEMO_SCALE:-demo}

# A simulated car: demonstrations, training, driving and plans beside the expert's, a report.
demo-driving: setup
	$(PY) train/demo_driving.py

# MT-10 of Meta-World: demonstrations, a policy, the suite with it, with it deaf and blind, and with the experts; and
# which numbers are not those of docs/benchmarks.json any more.
benchmark: setup
	$(PY) train/benchmark.py

# Flow matching, FAST tokens and knowledge insulation on the same data, see configs/studies/action_tokens.py.
STUDIES := runs/studies
SAWYER := $(STUDIES)/data/sawyer_sim/1.0.0
compare: setup
	$(PY) data/make_demos.py --robot sawyer --out $(STUDIES)/data --episodes-per-task 60 --val-episodes-per-task 4 \
	  --tasks button-press drawer-open window-close
	$(PY) data/stats.py --robot sawyer --data $(SAWYER) --out $(STUDIES)/stats/sawyer.json
	$(PY) data/fit_text.py --data $(SAWYER) --out $(STUDIES)/text.model --keys language_instruction subtask \
	  --state-in-prompt --vocab-size 1024
	$(PY) data/fit_fast.py configs/studies/fast.py --out $(STUDIES)/fast_tokens --vocab-size 512
	$(PY) train/study.py configs/studies/action_tokens.py --run $(STUDIES)/action_tokens

# Pretraining on four arms of robosuite and fine-tuning to the fifth, for each of them, see configs/studies/transfer.py.
# It can be stopped at any moment and goes on where it was.
TRANSFER := $(STUDIES)/transfer
ARMS := robosuite_iiwa robosuite_kinova3 robosuite_panda robosuite_sawyer robosuite_ur5e
transfer: arms
	for arm in $(ARMS); do \
	  $(PY) data/make_demos.py --robot $$arm --out $(TRANSFER)/data --episodes-per-task 50 --val-episodes-per-task 8 \
	    --tasks lift || exit 1; done
	test -f $(TRANSFER)/text.model || \
	  $(PY) data/fit_text.py --data $(ARMS:%=$(TRANSFER)/data/%_sim/1.0.0) --out $(TRANSFER)/text.model
	$(PY) train/study.py configs/studies/transfer.py --run $(TRANSFER)

# What answers that come late do, and real-time chunking, see train/chunking.py.
chunking: setup
	$(PY) train/chunking.py --run $(STUDIES)/chunking

test: setup lint
	$(PY) -m pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder  # two leave half of two cores idle

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Pins every package for Python 3.11 and newer (needs uv).
constraints:
	( echo "# Written by 'make constraints'. Used as: pip install --constraint constraints.txt"; \
	  ( echo "pip"; echo "editables"; sed 's/ /\n/g' <<< "$(NO_DEPS) $(ARMS_NO_DEPS)" ) > .no-deps.in; \
	  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --all-extras pyproject.toml; \
	  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-deps .no-deps.in; \
	  rm .no-deps.in ) > constraints.txt.new && mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) runs
