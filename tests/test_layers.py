"""Data flows one way: which file may know of which, read from imports and includes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, CSRC = ROOT / "torch_slide", ROOT / "csrc"
# A module imports only from lines above its own; modules of one line know nothing of each other.
ORDER = [
    ["config", "_ops"],
    ["reference", "functional", "hashing", "inference", "sparse", "dirty"],
    ["tables", "optim", "nn", "utils"],
    ["targets"],
    ["selection"],
    ["sampled", "activations"],
    ["logits"],
    ["losses", "logit_ops"],
    ["compiled"],
    ["linear"],
    ["convert", "diagnostics"],
    ["callbacks"],
    ["__init__"],
    ["data", "info"],
    ["train"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
AT_IMPORT = {"torch", "numpy", "torch_slide"} | set(sys.stdlib_module_names)
INCLUDES = {"kernels": {"kernels"}, "core": {"kernels", "core"}, "ops": {"kernels", "core", "ops"}}

SOURCES = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".inl"})


def relative(path):
    return str(path.relative_to(ROOT))


def part_of(path):
    """``tables`` for torch_slide/tables.py, ``hashing`` for everything in torch_slide/hashing."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """(module, names, whether it is needed when the file is imported) of every import but those for type checkers."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], id(node) not in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: imports are written in full"
            yield node.module, [alias.name for alias in node.names], id(node) not in inside


def parts_imported(path):
    for module, names, _ in imports(path):
        if module == "torch_slide":
            yield from (name if name in RANK else "__init__" for name in names or ["__init__"])
        elif module.startswith("torch_slide."):
            yield module.split(".")[1]


def test_every_module_has_its_place():
    assert {part_of(path) for path in SOURCES} == set(RANK)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_modules_import_from_above(path):
    part = part_of(path)
    for other in parts_imported(path):
        assert other == part or RANK[other] < RANK[part], f"{relative(path)} imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_torch_and_numpy_are_needed(path):
    needed = {module.split(".")[0] for module, _, at_import in imports(path) if at_import}
    assert needed <= AT_IMPORT


def test_nothing_else_is_loaded():
    code = (
        "import sys, torch._dynamo, numpy.random; before = set(sys.modules);"
        "import torch_slide, torch_slide.data;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    names = {name for name in loaded.stdout.split() if not name.startswith("_")}
    assert "torch_slide" in names
    assert names <= AT_IMPORT, names - AT_IMPORT
    assert not {"faiss", "matplotlib", "tqdm", "sklearn"} & names


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_one_file_touches_torch_ops(path):
    tree = ast.parse(path.read_text())
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert ("torch.ops" in found) == (relative(path) == "torch_slide/_ops.py")
    # Ops written in Python need the layers above _ops, so they live where they are used.
    registers = any(name.startswith(("torch.library.custom_op", "torch.library.register_fake")) for name in found)
    assert not registers or path.name in ("_ops.py", "compiled.py")


def test_the_oracles_know_only_the_configuration():
    assert set(parts_imported(PACKAGE / "reference.py")) <= {"config"}
    assert set(parts_imported(PACKAGE / "config.py")) == set()


def includes(path):
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", NATIVE, ids=relative)
def test_native_layers(path):
    folder = path.relative_to(CSRC).parts[0]
    for bracket, name in includes(path):
        if bracket == '"':
            assert name.split("/")[0] in INCLUDES[folder], f"{relative(path)} includes {name}"
            assert (CSRC / name).exists(), f"{relative(path)}: includes are written from csrc/"
        elif folder == "ops":
            assert "/" not in name or name.split("/")[0] in ("torch", "sys"), f"{relative(path)} includes {name}"
        else:
            assert re.fullmatch(r"[a-z_]+|immintrin\.h|cpuid\.h", name), f"{relative(path)} includes {name}"


@pytest.mark.parametrize("path", [p for p in NATIVE if "kernels" in p.parts], ids=relative)
def test_kernels_neither_allocate_nor_throw_nor_start_threads(path):
    text = re.sub(r"//[^\n]*", "", path.read_text())
    found = re.findall(r"\b(new|malloc|throw|try|std::vector|std::thread|parallel_for|omp)\b", text)
    assert not found or path.name == "dispatch.cpp", found


def test_no_file_is_built_for_one_machine():
    for path in [*NATIVE, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert "-march=native" not in path.read_text(), relative(path)


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE], ids=relative)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) < 400
