"""The compiled part: the native encoder. Where no compiler is found the install succeeds without it."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = Path("tokenize/native")

encoder = Pybind11Extension(
    "orchestrator.tokenize.native_encoder",
    [str(SOURCES / "module.cpp")],
    depends=sorted(map(str, SOURCES.glob("*.hpp"))),
    cxx_std=17,
    extra_compile_args=["-O3"],
)
encoder.optional = True
setup(ext_modules=[encoder])
