"""Packages whose names are imported when they are first used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

__all__ = ['attach']


def attach(
    package: Any, defined_in: Mapping[str, Sequence[str]], rooms: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package.

        __getattr__, __dir__ = attach(sys.modules[__name__], {'folding.exact': ('fold',)}, rooms=('far',))

    Args:
        package: the module.
        defined_in: module, named from the package, -> the names that it defines.
        rooms: modules of the package that are there without an import of their own.
    """
    module_of = {name: module for module, names in defined_in.items() for name in names}

    def find(name: str) -> Any:
        if name in rooms:
            return import_module(f'{package.__name__}.{name}')
        if name not in module_of:
            raise AttributeError(f'module {package.__name__!r} has no attribute {name!r}')
        found = getattr(import_module(f'{package.__name__}.{module_of[name]}'), name)
        setattr(package, name, found)
        return found

    def names() -> list[str]:
        return sorted({*vars(package), *module_of, *rooms})

    return find, names
