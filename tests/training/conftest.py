"""The tiny trainables as fixtures: test files of this folder are no package."""

import importlib.util
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="session")
def tiny():
    """The module tiny.py, which a subprocess also runs as a program."""
    spec = importlib.util.spec_from_file_location("tiny_trainables", TINY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_trainables"] = module
    spec.loader.exec_module(module)
    return module
