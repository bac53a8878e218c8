"""Syntax trees of the package, each made once: parsing all of it takes a second, and a dozen tests walk through it."""

import ast
import functools
from pathlib import Path


@functools.cache
def syntax_tree(path: Path) -> ast.Module:
    """The tree of a file. Shared: only read it."""
    return ast.parse(path.read_text(encoding="utf-8"))
