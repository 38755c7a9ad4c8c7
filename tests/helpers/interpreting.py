"""Triton's interpreter without the work whose result it throws away: the same numbers in half the time."""

import functools
from dataclasses import replace
from typing import Any

import triton.runtime.interpreter as interpreter
from triton import language as tl


class _Nothing:
    def restore(self) -> None:
        pass


def quicken() -> None:
    """For every kernel that this process interprets from now on.

    Each sum of integers is computed a second time in 64 bits, to see whether it overflows, for an assertion that the
    interpreter leaves out. The language is patched again for each call of a device function, by a search through all
    of its names; and a table of all dtypes is made for each operand.
    """
    builder, patch, np_dtype = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    assert not builder.options.debug, "with it, an overflow is said"
    builder.options = replace(builder.options, sanitize_overflow=False)
    patched = set[int]()  # modules whose language is patched in the launch that goes on

    def patch_once(function: Any) -> Any:
        module, launch = id(function.__globals__), not patched
        if module in patched:
            return _Nothing()
        scope = patch(function)
        patched.add(module)
        if launch:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    of_scalar = functools.cache(np_dtype)  # types of blocks and pointers have no hash
    pointer = of_scalar(tl.uint64)
    interpreter._patch_lang = patch_once
    interpreter._get_np_dtype = lambda kind: pointer if kind.scalar.is_ptr() else of_scalar(kind.scalar)
