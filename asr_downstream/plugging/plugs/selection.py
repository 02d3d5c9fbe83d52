"""`Selection`, the base class of all plugs: which sites of a model a plug goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from asr_downstream.errors import PlugError
from asr_downstream.plugging.gating.gates import Gate
from asr_downstream.plugging.gating.shared_unit import SharedUnit
from asr_downstream.plugging.sites import Site

__all__ = ['Selection', 'Streams']

# Name -> context in which random numbers come from a stream of that name.
Streams: TypeAlias = Callable[[str], AbstractContextManager[None]]


class Selection:
    """Sites of a model, and what is built for them.

    Args:
        sites: see `asr_downstream.plugging.sites.find_sites`.
        skip: patterns of sites to leave out; a recurrent state goes from the site before to the one after.

    Attributes:
        start: by what the layers of the sites are multiplied, once; None: they stay as they are.
    """

    start: float | None = None

    def __init__(self, sites: str | Sequence[str] = 'residual', skip: Sequence[str] = ()) -> None:
        if not patterns(skip):
            one = f', [{skip!r}]' if isinstance(skip, str) else ''
            raise PlugError(f'skip={skip!r} should be a list of patterns{one}')
        if not isinstance(sites, str) and not patterns(sites):
            raise PlugError(f"sites={sites!r} should be 'residual', 'all' or a list of patterns")
        if not isinstance(sites, str) and not sites:
            raise PlugError("sites=[] is empty: use 'residual', 'all' or patterns of layers, ['layer1.*.bn2']")
        self.sites = sites
        self.skip = list(skip)

    def select(self, sites: list[Site]) -> list[Site]:
        """Leave out the sites that ``skip`` names.

        Raises:
            PlugError: a pattern matches nothing, or all sites are left out.
        """
        for pattern in self.skip:
            if not any(fnmatchcase(site.path, pattern) for site in sites):
                raise PlugError(f'skip: {pattern!r} matches none of the {len(sites)} sites, such as {sites[0].path}')
        kept = [s for s in sites if not any(fnmatchcase(s.path, pattern) for pattern in self.skip)]
        if not kept:
            raise PlugError(f'skip={self.skip!r} leaves out all {len(sites)} sites')
        return kept

    def build(self, sites: list[Site], stream: Streams) -> tuple[dict[str, list[Gate]], list[SharedUnit]]:
        """Build the gates of all ``sites``; the model is not touched.

        Returns:
            Path of the site -> its gates, and the units that they share.
        """
        return {site.path: [] for site in sites}, []


def patterns(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
