"""Annotations, and the names a user sees. The type checkers themselves run in `make lint`."""

import inspect
import runpy
import types
from pathlib import Path

import pytest

import cece

FUNCTIONS = [f for f in map(cece.__dict__.get, cece.__all__) if inspect.isfunction(f)]
CLASSES = [c for c in map(cece.__dict__.get, cece.__all__) if inspect.isclass(c)]
METHODS = [f for c in CLASSES if not issubclass(c, tuple) for f in vars(c).values() if inspect.isfunction(f)]


@pytest.mark.parametrize("f", FUNCTIONS + METHODS, ids=lambda f: f.__qualname__)
def test_everything_public_is_annotated(f):
    signature = inspect.signature(f)
    assert signature.return_annotation is not signature.empty
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert bare in ([], ["self"])


def test_no_helper_is_public():
    public = {name for name, value in vars(cece).items() if not name.startswith("_")}
    modules = {name for name in public if isinstance(getattr(cece, name), types.ModuleType)}
    assert (public - modules) | {"reference"} == set(cece.__all__)
    assert {name for name in dir(cece) if not name.startswith("_")} == set(cece.__all__)
    assert all(getattr(cece, name).__name__ == f"cece.{name}" for name in modules)


def test_the_program_that_lint_checks_runs():
    assert runpy.run_path(str(Path(__file__).parent / "typing" / "user.py"))["version"] == cece.__version__
