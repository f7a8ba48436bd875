import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_slide
from torch_slide._ops import ops

LEVELS = ("scalar", "avx2", "avx512", "avx512bf16")
LIBRARY = next(Path(torch_slide.__file__).parent.glob("_C*.so"))


def python(*args: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_SLIDE_ISA": isa, "PYTHONPATH": str(Path(torch_slide.__file__).parents[1])}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, check=False)


@functools.cache
def runnable() -> tuple[str, ...]:
    refused = python("-c", "import torch_slide._ops", isa="none").stderr
    match = re.search(r"this processor runs \((.*)\), got none", refused)
    assert match, refused
    return tuple(match[1].split(", "))


@functools.cache
def digests(isa: str) -> dict[str, Any]:
    run = python(str(Path(__file__).with_name("isa_digests.py")), isa=isa)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("isa", LEVELS)
def test_codes_are_bit_equal(isa: str) -> None:
    if isa not in runnable():
        pytest.skip(f"this processor does not run {isa}")
    found, expected = digests(isa), digests("scalar")["runs"][0]
    assert found["isa"] == isa
    for run in found["runs"]:
        assert run == expected


def test_digests_tell_different_codes_apart() -> None:
    run = digests("scalar")["runs"][0]
    assert len(run) == 3 + 3 * 5 + 6 * 3
    assert len(set(run.values())) == len(run)


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx512bf16"])
def test_an_impossible_instruction_set_is_an_error_at_import(isa: str) -> None:
    levels = runnable()
    if isa in levels:
        pytest.skip(f"this processor runs {isa}")
    error = python("-c", "import torch_slide._ops", isa=isa).stderr.strip().splitlines()[-1]
    expected = f"one that this processor runs ({', '.join(levels)}), got {isa}"
    assert error == f"ValueError: TORCH_SLIDE_ISA: expected the instruction set to be {expected}"


def test_the_widest_instruction_set_is_the_default() -> None:
    assert runnable()[0] == "scalar"
    run = python("-c", "from torch_slide._ops import ops; print(ops.isa())", isa="")
    assert run.stdout.strip() == runnable()[-1]


def test_vector_instructions_stay_in_their_namespaces() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    if "file format elf64-x86-64" not in listing:
        pytest.skip("not an x86-64 library")
    allowed = {
        r"%zmm\d|%k[0-7]": {"avx512", "avx512bf16"},
        r"%ymm\d": {"avx2", "avx512", "avx512bf16"},
        r"vdpbf16ps": {"avx512bf16"},
        r"v\w+\s": {"avx2", "avx512", "avx512bf16"},  # any VEX or EVEX instruction
    }
    seen: dict[str, set[str]] = {pattern: set() for pattern in allowed}
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        namespace = re.search(r"\bisa_(\w+)::", name)
        for pattern in allowed:
            if re.search(rf"\t(?:{pattern})" if pattern.startswith("v") else pattern, body):
                seen[pattern].add(namespace[1] if namespace else name)
    assert seen == allowed  # nowhere else, and in each of them


def test_openmp_runs_our_loops_and_obeys_set_num_threads() -> None:
    assert "OpenMP" in torch.__config__.parallel_info()
    assert "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert ops.num_threads() == threads
    finally:
        torch.set_num_threads(before)
