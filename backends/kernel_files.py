"""The kernels that Inductor writes for a graph on CPU are compiled some to a file, not each by itself.

Every file costs the C++ compiler the better part of a second before it comes to the kernel in it (headers, debug information,
the linker). A rewritten prefill has some thirty kernels, most of which take it a tenth of a second: thirty files are eighteen
seconds of two processors' time, two files less than three. The kernels themselves, flags and results are Inductor's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from parvts_fx.torch_private import compiling_kernels, kernel_bindings, kernel_threads

_LEAST = 4
"""Kernels of a file, where there are as many: of fewer, the file costs more than they do."""

_SOURCE = re.compile(r'\s*(#include <[^>\n]+>)\n((?:(?!#include).)*)', re.DOTALL)
_ENTRY = re.compile(r'extern "C"\s+void\s+kernel\(')

_HEADERS = "#define PY_SSIZE_T_CLEAN\n#include <Python.h>\n#include <sstream>\n#include <cstdlib>\n#include <cerrno>\n"
"""What the calls from Python include: in front of the kernels' namespaces, in which it then means nothing."""

_LOG = logging.getLogger("parvts_fx")


@dataclasses.dataclass
class _Kernel:
    """A kernel of a graph, in the place of the function that calls it until that is compiled.

    Args:
        types: those of its arguments, as C++ names them.
        source: Inductor's.
        alone: what compiles it by itself and returns the function.
        function: where compiling has begun, what waits for it.
    """

    types: Sequence[str]
    source: str
    alone: Callable[[], Any]
    function: Callable[[], Any] | None = None

    def result(self) -> Any:
        try:
            assert self.function is not None
            return self.function()
        except Exception as error:  # a source that is not understood, another Inductor: all of it works by itself
            _LOG.debug("a kernel is compiled by itself: %s", error)
            return self.alone()


def kernels_share_files() -> contextlib.AbstractContextManager[None]:
    """While it lasts, graphs that Inductor compiles for a CPU have their kernels in as many files as compile at once."""
    return compiling_kernels(_with_shared_files)


@functools.cache
def _with_shared_files(compiler: type) -> type:
    class SharedFiles(compiler):  # type: ignore[misc]
        def cpp_pybinding(self, argtypes: Sequence[str], source_code: str) -> Any:
            alone = functools.partial(super().cpp_pybinding, argtypes, source_code)
            if _parts(source_code) is None:
                return alone()
            return _Kernel(argtypes, source_code, lambda: _finished(alone()))

        def wait(self, scope: dict[str, Any]) -> None:
            kernels = {name: held for name, held in scope.items() if isinstance(held, _Kernel)}
            with contextlib.suppress(Exception):  # those that have not begun are compiled alone
                _begin(list(kernels.values()), self.submit)
            scope.update({name: kernel.result() for name, kernel in kernels.items()})
            super().wait(scope)

    return SharedFiles


def _finished(held: Any) -> Any:
    return held.result() if hasattr(held, "result") else held


def _parts(source: str) -> tuple[str, str] | None:
    """Inductor's header and one kernel; None if there is more, or less."""
    found = _SOURCE.fullmatch(source)
    return found.groups() if found and len(_ENTRY.findall(source)) == 1 else None  # type: ignore[return-value]


def _begin(kernels: Sequence[_Kernel], submit: Callable[..., Any]) -> None:
    """Have kernels compiled, and say how each is to be waited for. How they are parted depends on nothing but what they are and
    how many threads compile, so that another process finds the files."""
    files = max(1, min(kernel_threads(), len(kernels) // _LEAST))
    for number in range(files):
        part = kernels[number::files]
        text = _file(part)
        begun = [kernel_bindings(_name(place)).load_async(text, "cpu", submit_fn=None if place else submit)
                 for place in range(len(part))]
        for place, (kernel, load) in enumerate(zip(part, begun)):
            kernel.function = functools.partial(_function, load, _name(place))


def _function(load: Callable[[], Any], name: str) -> Any:
    return getattr(load(), name)


def _name(place: int) -> str:
    return f"kernel_{place}"


def _file(kernels: Sequence[_Kernel]) -> str:
    """All kernels, each in a namespace with the function that Python calls: a module of its own in the library."""
    headers, spaces = dict[str, None](), []
    for place, kernel in enumerate(kernels):
        header, body = _parts(kernel.source) or ("", "")
        headers[header] = None
        named = _ENTRY.sub(f"static void {_name(place)}(", body)
        spaces.append(f"namespace parvts_{place} {{\n{named}\n{_call(_name(place), kernel.types)}\n}}\n")
    return "\n".join([*headers, _HEADERS, *spaces])


def _call(name: str, types: Sequence[str]) -> str:
    """The function that Python calls, as Inductor writes it for a kernel alone."""
    bindings = kernel_bindings(name)
    given = ", ".join(f"parse_arg<{kind.replace('const ', '')}>(args, {number})" for number, kind in enumerate(types))
    return bindings.suffix_template.format(
        arg_len=len(types), call_entry_func=bindings.call_entry_function.format(given), entry_func=name, extra_parse_arg="")
