"""Registering with a part of torch that is slow to import, once somebody else imports it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls back after it has run."""

    def __init__(self, module: str, call) -> None:
        self.module, self.call = module, call

    def find_spec(self, name, path=None, target=None):
        if name != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader, call = spec.loader, self.call
        run = loader.exec_module

        def run_and_call(module):
            run(module)
            call()

        loader.exec_module = run_and_call
        return spec


def when_imported(module: str, call) -> None:
    """Calls call() now if module is imported, else right after its import."""
    if module in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(module, call))
