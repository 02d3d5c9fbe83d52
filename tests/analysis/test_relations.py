"""Where tokens look, on maps whose answer is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('transformers')

from asr_downstream.far.evaluation.relations import locality


def test_tokens_that_look_at_themselves() -> None:
    found = locality(torch.eye(16).expand(3, -1, -1))
    assert (found.itself, found.near, found.distance) == (1, 0, 0)


def test_tokens_that_look_at_all_alike() -> None:
    """On 4 x 4 tokens there are 84 ordered pairs of neighbours: 24 * 2 beside and above, 18 * 2 across."""
    found = locality(torch.ones(2, 17, 17) / 17)  # with a class token, which is left out
    assert found.itself == pytest.approx(1 / 16)
    assert found.near == pytest.approx(84 / 256)
    places = [(y, x) for y in range(4) for x in range(4)]
    distances = [((a - c) ** 2 + (b - d) ** 2) ** 0.5 for a, b in places for c, d in places]
    assert found.distance == pytest.approx(sum(distances) / 256)


def test_tokens_that_look_at_the_one_before_in_the_scan() -> None:
    """The first of a row looks at the end of the row above: three columns and a row away."""
    maps = torch.eye(16).roll(-1, 1)[None].clone()
    maps[0, 0] = 0
    maps[0, 0, 0] = 1
    found = locality(maps)
    assert found.itself == pytest.approx(1 / 16)
    assert found.near == pytest.approx(12 / 16)
    assert found.distance == pytest.approx((12 + 3 * 10**0.5) / 16)
