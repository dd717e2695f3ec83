"""The kernels' fuzz once more, in a library built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUZZ = [
    "ops_linear",
    "ops_attention",
    "attention",
    "ops_activation",
    "ops_norm",
    "ops_quantized",
    "ops_group_scales",
    "ops_sampling",
    "decode_step",
]
# What torch imports its compiler for, and statistics: neither tells of memory.
LEFT_OUT = "not contract and not frequencies and not 30011"
RUN = """
import sys
from pathlib import Path
from llmctl.ops import native
library = Path(sys.argv[1])
native.path = lambda: library
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def runtime(compiler: str, name: str) -> str | None:
    """The sanitizer's shared library, which must be loaded before a program that was not built with it."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return found.strip() if os.path.isabs(found.strip()) else None


@pytest.mark.slow
def test_the_fuzz_is_clean_under_sanitizers(tmp_path):
    compiler, cmake = shutil.which("g++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs g++ and cmake")
    runtimes = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    if None in runtimes:
        pytest.skip("the compiler has no sanitizers")
    configure = [cmake, "-S", ROOT / "csrc", "-B", tmp_path, "-DLLMCTL_SANITIZE=address,undefined"]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1 -g1"]
    for command in (configure, [cmake, "--build", tmp_path, "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in FUZZ]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", LEFT_OUT]
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "libllmctl.so"), *options, *tests],
        env={**environment, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert "passed" in result.stdout
