"""The house keeps its rules: who may import whom, sizes, every operation has its files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_ref.dispatch import OPERATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qlora_ref"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40  # of statements, without docstring and signature; 5 to 25 is usual

# What each module may import of this package. A name stands for itself and all that is above it.
LAYERS = [
    {"optimal_float"},
    {"version", "codebooks", "packing", "files", "matmul_plan", "torch_adamw"},
    {"model_sizes"},
    {"reference", "checks", "native_operations", "optimizer_rules"},
    {"native"},
    {"dispatch"},
    {"torch_library"},
    {"ops"},
    {"scales", "gptq"},
    {"quantized", "calibration"},
    {"tensor_format", "paging"},
    {"module4bit", "data", "paged", "settings"},
    {"linear", "parameter4bit", "state_optimizer"},
    {"optim", "optimizers", "adapter_init"},
    {"lora", "evaluate"},
    {"places", "pretrained"},
    {"convert", "memory", "adapter", "checkpoint"},
    {"models", "training_state", "plots"},
    {"finetune", "inspection", "merging", "doctor", "study"},
    {"benchmark", "memory_model"},
    {"cli", "integrations"},
    {"stand_in"},
    {"as_bitsandbytes"},
]
# Imported inside a function, where the layers would otherwise form a ring.
LATE = {("quantized", "tensor_format"), ("pretrained", "integrations")}
OUTSIDE = {
    "optimal_float": {"torch"},
    "codebooks": {"torch"},
    "packing": {"torch"},
    "reference": {"torch"},
    "checks": {"torch"},
    "paging": {"torch"},
    "paged": {"torch"},
    "optimizer_rules": {"torch"},
    "ops": {"torch"},
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def python_files() -> list[Path]:
    folders = ("qlora_ref", "kernels", "benchmarks", "tests", "docs")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room(path: Path) -> str:
    """The name under which a module appears in LAYERS: its own, or its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "qlora_ref":
            names |= {f"qlora_ref.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def rank(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", modules(), ids=lambda path: room(path) + "/" + path.stem)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    for name in imported(path):
        if not name.startswith("qlora_ref."):
            continue
        target = name.split(".")[1]
        same_room = target == room(path) and path.parent != PACKAGE
        allowed = same_room or rank(target) < rank(room(path)) or (path.stem, target) in LATE
        assert allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: room(path) + "/" + path.stem)
def test_nobody_imports_the_command_line_or_bitsandbytes(path: Path) -> None:
    names = imported(path)
    if room(path) != "cli":
        assert not {name for name in names if name.startswith("qlora_ref.cli")}
    if room(path) not in ("integrations", "benchmark"):  # what they stand in for, or time
        assert not {name for name in names if name.split(".")[0] in ("bitsandbytes", "peft")}


@pytest.mark.parametrize("path", modules(), ids=lambda path: room(path) + "/" + path.stem)
def test_the_core_leans_on_torch_alone(path: Path) -> None:
    if room(path) not in OUTSIDE:
        return
    outside = {name.split(".")[0] for name in imported(path)} - {"qlora_ref"}
    assert outside - set(sys.stdlib_module_names) <= OUTSIDE[room(path)]


def test_kernels_import_neither_the_package_nor_make_one() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's kernels
    for path in (ROOT / "kernels").glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] == "qlora_ref"}


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def c_files() -> list[Path]:
    folders = [ROOT / "csrc", ROOT / "tests" / "native"]
    return sorted(path for folder in folders for path in folder.rglob("*.[ch]*"))


@pytest.mark.parametrize("source", c_files(), ids=lambda path: path.name)
def test_no_c_file_is_too_long(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_has_its_files(operation: str) -> None:
    definition = f"def {operation}("
    assert definition in (PACKAGE / "ops.py").read_text()
    assert definition in (PACKAGE / "reference" / f"{operation}.py").read_text()
    assert (ROOT / "tests" / f"test_{operation}.py").exists()
    assert (ROOT / "benchmarks" / f"bench_{operation}.py").exists()


BESIDE_OPERATIONS = (
    *("interface_version", "best_isa", "multiply_in_registers"),
    *("matmul_general", "matmul_few_tokens", "matmul_many_tokens", "split_sum"),  # of matmul_4bit
    *(
        "launch",
        "decode",
        "permute",
        "nearest",
        "matmul_tiles",
        "tuning",
    ),  # what Triton kernels share
)


@pytest.mark.parametrize("folder", ["kernels", "csrc/cpu", "csrc/cuda"])
def test_a_kernel_file_is_named_after_an_operation(folder: str) -> None:
    for path in (ROOT / folder).glob("*.*"):
        if path.suffix in (".cpp", ".cu", ".py"):
            assert path.stem in (*OPERATIONS, *BESIDE_OPERATIONS)


def test_every_public_function_has_a_docstring() -> None:
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if public and room(path) not in ("checks",):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


BLOCKED = ("bitsandbytes", "transformers", "peft", "triton", "gguf", "matplotlib", "accelerate")


def test_every_module_imports_without_optional_packages_and_without_a_warning() -> None:
    # These are for those who have the library that they are about.
    own = [path for path in modules() if path.parent.name != "integrations"]
    names = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in own]
    script = (
        "import sys, importlib, torch\n"
        f"for name in {BLOCKED}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_adds_only_itself_to_torch() -> None:
    # What makes an import slow is what it drags along. 20 ms were measured; 100 ms is the promise.
    script = (
        "import sys, torch, torch.library\n"
        "before = set(sys.modules)\n"
        "import qlora_ref\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    third_party = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"qlora_ref", "torch"}
    assert done.returncode == 0 and third_party == set()
