"""Builds fastpost._native, optional C++ (the head on a CPU, best fit); everything else is in pyproject.toml.

It is built where torch and a C++ compiler are at hand, which under pip means `--no-build-isolation` and torch installed
first. Anywhere else the install says what is missing and goes on: the library then runs on its torch code.
"""

import shutil
import sys
from glob import glob

from setuptools import setup

SOURCES = sorted(glob("csrc/*.cpp"))
# Compiled with OpenMP but without a libgomp of its own: torch's is loaded, and two would fight for the cores.
# No contraction: where a b - c d is 0, so it stays on every CPU, and a KL's gradient lives of that.
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


def missing() -> str | None:
    """What keeps the extension from being built, or None."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ImportError:
        return "torch at build time (install torch first, then `pip install --no-build-isolation`)"
    compiler = get_cxx_compiler()
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler!r} is not on PATH; CXX names another)"


def extension() -> dict[str, object]:
    """The arguments of setup() that build it. `optional`: a compiler that fails is a warning, not the end."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    native = CppExtension("fastpost._native", SOURCES, extra_compile_args=FLAGS, optional=True)
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


lacking = missing() if SOURCES else None
if lacking:
    print(f"fastpost: the native extension is not built, for want of {lacking}. All else works.", file=sys.stderr)
setup(**(extension() if SOURCES and not lacking else {}))
