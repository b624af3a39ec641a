"""``python -m cece run``: a program as Python itself would run it, but with torch's losses patched to be cece's.

Arguments, ``sys.path``, ``__main__``, exit code and traceback are those of ``python SCRIPT ARGS...`` or
``python -m MODULE ARGS...``. At the end a few lines on stderr say how many calls went where.
"""

import atexit
import importlib.machinery
import io
import os
import pkgutil
import runpy
import sys
import types
from typing import Any

from ._patch import patch

USAGE = "usage: python -m cece run SCRIPT ARGS...\n       python -m cece run -m MODULE ARGS..."


def run(arguments: list[str]) -> int:
    """Runs the program; returns if it ends by itself, else whatever it raises goes on from here."""
    is_module = arguments[:1] == ["-m"]
    program = arguments[is_module : is_module + 1]
    if not program or (program[0].startswith("-") and not is_module):
        asked = program in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    sys.argv = arguments[is_module:]
    patched = patch()
    atexit.register(_report, patched)
    try:
        if is_module:
            _run_module(program[0])
        else:
            _run_script(program[0])
    except SystemExit:
        raise
    except BaseException as e:
        _hide_frames_above(e)
        raise
    return 0


def _main_module(**attributes: Any) -> dict[str, Any]:
    """A new ``__main__``, in the place of cece's own."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={}, **attributes)
    return main.__dict__


def _set_first_path(path: str) -> None:
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):  # else Python put none there
        sys.path[0] = path


def _run_module(name: str) -> None:
    _main_module()
    sys.argv[0] = "-m"  # until it is found, as Python has it
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _run_script(script: str) -> None:
    if pkgutil.get_importer(script) is not None:  # a folder or an archive with a __main__.py
        _set_first_path(os.path.abspath(script))
        _main_module()
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as e:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {e.errno}] {e.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    space = _main_module(__file__=path, __cached__=None, __loader__=loader)
    exec(compile(source, path, "exec", dont_inherit=True), space)


def _hide_frames_above(e: BaseException) -> None:
    """Makes the traceback start where Python's would, below this file's frames."""
    tb = e.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename == __file__:
        tb = tb.tb_next
    hook = sys.excepthook  # the program's own, if it has set one

    def show(kind: type[BaseException], value: BaseException, _: types.TracebackType | None) -> None:
        hook(kind, value.with_traceback(tb), tb)

    sys.excepthook = show


def _report(patched: patch) -> None:
    called = {name: counts for name, counts in patched.calls.items() if counts}
    for name, counts in called.items():
        total = sum(counts.values())
        print(f"cece run: {name}: {total} call{'s' if total > 1 else ''}", file=sys.stderr)
        for where, number in sorted(counts.items(), key=lambda item: -item[1]):
            print(f"cece run: {number:9} by {where}", file=sys.stderr)
    if not called:
        print("cece run: none of torch's losses was called", file=sys.stderr)
