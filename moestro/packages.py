"""Packages that can be called: `moestro.compare(...)` and `moestro.report(...)`, which are also packages.

Importing a module of a package makes the package an attribute of `moestro`, so a function cannot keep that name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str) -> None:
    """Let calls of a package go to the function of the same name in its module `home`, imported when first called."""

    class Package(ModuleType):
        def __call__(self, *arguments: Any, **settings: Any) -> Any:
            function = getattr(import_module(home), package.rpartition(".")[2])
            return function(*arguments, **settings)

    sys.modules[package].__class__ = Package
