"""Hands griffe, which reads the source, the docstrings that are composed when it is imported."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class ComposedDocstrings(griffe.Extension):
    """Takes the docstring of each loss as `help` shows it."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Replace a docstring that has a place for what the losses share."""
        if func.docstring is not None and "{shared}" in func.docstring.value:
            module = importlib.import_module(func.module.path)
            func.docstring.value = inspect.cleandoc(getattr(module, func.name).__doc__)
