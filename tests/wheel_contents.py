"""Run by wheel_smoke.sh: what is in the wheel, and what must not be."""

import re
import sys
import zipfile
from pathlib import Path

wheel = Path(sys.argv[1])
assert "-cp310-abi3-" in wheel.name, f"not an abi3 wheel: {wheel.name}"
with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    library = archive.read("torch_slide/_C.abi3.so")

assert "torch_slide/py.typed" in names
folders = {name.split("/")[0] for name in names}
assert all(folder == "torch_slide" or folder.endswith(".dist-info") for folder in folders), folders
assert not [name for name in names if re.search(r"test_|conftest|\.cpp$|\.h$|__pycache__", name)], names
for isa in (b"scalar", b"avx2", b"avx512", b"avx512bf16"):
    assert re.search(rb"isa_%s\b" % isa, library) or b"kernels_%s" % isa in library, f"no {isa.decode()} kernels"
# The compiler writes what it was told to compile for into the debug information.
machines = set(re.findall(rb"-march=([\w.-]+)", library))
assert machines <= {b"x86-64"}, f"compiled for {machines}"
print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files, compiled for {machines or 'any'}")
