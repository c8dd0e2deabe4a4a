"""For the API reference: `from .module import name as name` in an `__init__.py` makes `name` a member of the folder."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Reexports(griffe.Extension):
    """Takes such names for the `__all__` that the file does not have; griffe itself knows only `__all__`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called once, when the package is loaded."""
        for folder in (module for module in pkg.modules.values() if module.is_init_module and module.exports is None):
            imports = [node for node in ast.parse(folder.source).body if isinstance(node, ast.ImportFrom)]
            names = [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
            folder.exports = names or None
