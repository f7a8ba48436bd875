#!/bin/sh
# Says what is missing on this machine before anything is downloaded: a Python, its headers, a compiler.
python=$1
compiler=${CXX:-c++}

fail() {
    echo "torch_slide: $1" >&2
    exit 1
}

command -v "$python" > /dev/null || fail "there is no $python; name a Python 3.10 or newer: make PYTHON=/path/to/python3"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed, $python is $version; name another: make PYTHON=/path/to/python3"
command -v "$compiler" > /dev/null ||
    fail "a C++17 compiler is needed, there is no $compiler (Debian, Ubuntu: apt install g++; or set CXX)"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] ||
    fail "the headers of Python are needed, there is no $headers/Python.h (Debian, Ubuntu: apt install python3-dev)"
echo '#include <string_view>' | "$compiler" -std=c++17 -fsyntax-only -x c++ - ||
    fail "a C++17 compiler is needed, $compiler is not one (set CXX)"
