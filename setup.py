"""Builds the C++ ops. Everything else about the package is in pyproject.toml."""

import os
import sys
from pathlib import Path
from typing import NoReturn


def give_up(problem: str) -> NoReturn:
    sys.exit(
        f"torch_slide: {problem}\n"
        "Install what building needs, then build without isolation:\n"
        "    pip install torch==2.13.0 'setuptools>=77' wheel ninja\n"
        "    pip install --no-build-isolation ."
    )


try:
    import setuptools
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as missing:
    give_up(f"building needs {missing.name}, which is not installed here.")
if int(setuptools.__version__.split(".")[0]) < 77:  # pip checks no versions without isolation
    give_up(f"building needs setuptools 77 or later, here is {setuptools.__version__}.")

# 2.10 is the oldest torch whose stable ABI has all that we call; one wheel then serves that torch and later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
headers = sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").rglob(pattern))
sanitize = os.environ.get("TORCH_SLIDE_SANITIZE")
# Contraction off: a product and a sum that one instruction set fuses and another does not would not be bit-equal.
compile_args = [
    "-std=c++17",
    "-O3",
    "-g1",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
]
link_args = []
if sanitize:
    compile_args += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1"]
    link_args += [f"-fsanitize={sanitize}"]

setuptools.setup(
    ext_modules=[
        CppExtension(
            name="torch_slide._C",
            sources=sources,
            depends=headers,
            include_dirs=[str(Path("csrc").resolve())],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
