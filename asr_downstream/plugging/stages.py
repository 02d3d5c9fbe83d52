"""Which sites share an attention, and in which order a recurrent state runs along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TypeAlias

from asr_downstream.console.text import some
from asr_downstream.errors import PlugError
from asr_downstream.plugging.sites import Site

__all__ = ['Group', 'Share', 'group_sites']

Share: TypeAlias = str | Sequence[Sequence[str]] | Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class Group:
    """Sites that share one attention.

    Attributes:
        name: for people and for the names of the weights.
        runs: the sites; a recurrent state starts from zero at the first of each run.
    """

    name: str
    runs: tuple[tuple[Site, ...], ...]


def group_sites(sites: list[Site], share: Share) -> list[Group]:
    """Group ``sites``, which are in the order of ``named_modules()``.

    Args:
        sites: of one plug.
        share: ``'stage'``: the sites of one width, one after another, whose blocks have the same parent: one unit, one
            run. ``'width'``: one unit for all sites of a width in the model; its state starts again at every stage.
            A list of lists of patterns: one unit a list, and one run, in the order of the patterns; a dict of such
            lists names the units, which are ``group0``, ``group1``, ... otherwise.

    Raises:
        PlugError: an unknown ``share``, a pattern without a site, a site in two groups or in none, or a group of
            sites with different numbers of channels.
    """
    stages = [
        Group(name, (tuple(run),)) for (name, _), run in groupby(sites, key=lambda site: (site.stage, site.channels))
    ]
    if share == 'stage':
        return stages
    if share == 'width':
        widths = sorted({site.channels for site in sites})
        return [
            Group(f'width{width}', tuple(g.runs[0] for g in stages if g.runs[0][0].channels == width))
            for width in widths
        ]
    if isinstance(share, str) or share is None:
        raise PlugError(f"share={share!r} is not known: use 'stage', 'width', or lists of patterns of sites")
    return listed(sites, share)


def listed(sites: list[Site], share: Sequence[Sequence[str]] | Mapping[str, Sequence[str]]) -> list[Group]:
    """Groups that the user has written down."""
    names = list(share) if isinstance(share, dict) else None
    share = list(share.values()) if isinstance(share, dict) else share
    if not isinstance(share, list | tuple):
        raise PlugError(f"share={share!r} should be 'stage', 'width', or lists of patterns of sites")
    if any(not isinstance(p, list | tuple) or any(not isinstance(item, str) for item in p) for p in share):
        one = f': [{share!r}]' if all(isinstance(p, str) for p in share) else ''
        raise PlugError(f'share={share!r} should be a list of groups, each a list of patterns{one}')
    groups: list[Group] = []
    taken: set[str] = set()
    for number, patterns in enumerate(share):
        run: dict[str, Site] = {}
        for pattern in patterns:
            matches = {site.path: site for site in sites if fnmatchcase(site.path, pattern)}
            if not matches:
                raise PlugError(
                    f'share: {pattern!r} matches none of the sites, which are {some([s.path for s in sites])}'
                )
            run.update(matches)
        if not run:
            raise PlugError(f'share: group {number} is empty')
        if twice := taken & run.keys():
            raise PlugError(f'share: {some(sorted(twice))} would be in two groups')
        widths = sorted({site.channels for site in run.values()})
        if len(widths) > 1:
            raise PlugError(
                f'share: group {number} has sites of {", ".join(map(str, widths))} channels, and one attention has one '
                f'width: split it'
            )
        taken |= run.keys()
        groups.append(Group(names[number] if names else f'group{number}', (tuple(run.values()),)))
    if left := [site.path for site in sites if site.path not in taken]:
        raise PlugError(f'share: {some(left)} are in no group; add them, or leave them out with skip=[...]')
    return groups
