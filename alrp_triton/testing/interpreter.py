"""What Triton's interpreter does more often than it has to: half of a kernel's time, no result."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any


@functools.cache  # once is enough
def speed_up() -> None:
    """Leave that out in this process."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    language, patch = interpreter.tl, interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """Put the operators in place with each launch, not with each call of a function in it."""
        for module in function.__globals__.values():
            known = module is language or module is language.core
            if known and language.core.is_builtin(module.arange):  # not replaced yet
                return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    # Sums of integers are taken twice, and what an assertion would say of them is not asked for.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # A dictionary of all types is built for each look-up.
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)
    interpreter._get_np_dtype = lambda x: known(x) if type(x) is language.dtype else look_up(x)
