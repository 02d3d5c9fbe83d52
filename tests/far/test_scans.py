"""Scans: which head reads the tokens in which order, in every form, host, export, pruned model and folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.far import CASES, FAR, Block, unet, vit
from torch import Tensor, nn

from asr_downstream import far
from asr_downstream.errors import PlugError
from asr_downstream.far import MultiHeadLSTM, describe, load_far, replace, save_far
from asr_downstream.far.model.backends import EXECUTIONS
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.prune.scores import mask_units, scores, shrink, units_above

CROSS = {**FAR, 'scan': 'cross'}


def columns(before: int, rows: int, width: int, after: int) -> list[int]:
    """Indices of tokens as a head reads them that goes column by column."""
    grid = [before + row * width + column for column in range(width) for row in range(rows)]
    return [*range(before), *grid, *range(before + rows * width, before + rows * width + after)]


def reference(module: MultiHeadLSTM, tokens: Tensor, order: list[int]) -> list[Tensor]:
    """States of each head, one `torch.nn.LSTM` after the other; the second half reads in this order."""
    found = []
    parts = tokens.chunk(len(module.heads), -1)
    for number, (head, x) in enumerate(zip(module.heads, parts, strict=True)):
        if number < (len(parts) + 1) // 2:
            found.append(head(x))
        else:
            out = torch.empty(*x.shape[:2], sum(head.widths), dtype=x.dtype)
            out[:, order] = head(x[:, order])
            found.append(out)
    return found


LAYOUTS = {
    'square': (0, 3, 3, 0), 'class token': (1, 3, 3, 0), 'two in front, one behind': (2, 3, 4, 1), 'a row': (0, 1, 5, 0)
}  # fmt: skip


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('widths', [None, [(8, 0), (0, 0), (3, 5)]], ids=['even', 'pruned'])
@pytest.mark.parametrize('variant', ['M1', 'M3'])
def test_half_of_the_heads_reads_columns(layout: tuple[int, int, int, int], widths: Any, variant: str) -> None:
    torch.manual_seed(0)
    before, rows, width, after = layout
    scan = dict(type='cross', grid=(rows, width), before=before, after=after)
    module = randomise(MultiHeadLSTM(12, 3, variant, widths, scan=scan)).double()
    x = torch.randn(2, before + rows * width + after, 12, dtype=torch.float64)
    order = columns(*layout)
    wanted = reference(module, x, order)
    plain = randomise(MultiHeadLSTM(12, 3, variant, widths)).double()
    plain.load_state_dict(module.state_dict())
    raster = plain.states(x)
    grads = {}
    for name in EXECUTIONS:
        module.execution = name
        for a, b in zip(module.states(x), wanted, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12), name
        module.zero_grad()
        module(x).square().sum().backward()
        grads[name] = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    for name, found in grads.items():
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, grads['loop'], strict=True)), name
    assert all(torch.equal(a, b) for a, b in zip(raster[:2], wanted[:2], strict=True))
    if rows > 1:
        assert not torch.allclose(raster[2], wanted[2], atol=1e-3)


def test_a_column_is_read_to_its_end_before_the_next() -> None:
    module = randomise(MultiHeadLSTM(8, 2, scan='cross', before=1)).double()
    x = torch.randn(1, 10, 8, dtype=torch.float64, requires_grad=True)
    for head, seen in ((0, {0, 1, 2}), (1, {0, 1, 4, 7, 2})):  # at the second token of the first row
        (grad,) = torch.autograd.grad(module.states(x)[head][0, 2, :4].sum(), x)
        assert set(grad[0].abs().sum(-1).nonzero().flatten().tolist()) == seen


def test_the_operator_reads_the_same() -> None:
    from asr_downstream.far.model.ops.lstm import operator

    if not operator().there:
        pytest.skip(operator().reason)
    module = randomise(MultiHeadLSTM(24, 3, widths=[(8, 8), (3, 20), (9, 2)], scan='cross', before=1)).eval()
    x = torch.randn(3, 17, 24)
    with torch.no_grad():
        found = {}
        for name in ('fused', 'loop'):
            module.execution = name
            found[name] = torch.cat(module.states(x), -1)
        wanted = torch.cat(reference(module, x, columns(1, 4, 4, 0)), -1)
    assert torch.allclose(found['fused'], wanted, rtol=0, atol=1e-6)
    assert torch.allclose(found['loop'], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', ['ViT', 'DeiT', 'UNet2DModel', 'DiT'])
def test_hosts_know_their_grids(name: str) -> None:
    case = CASES[name]
    model = case.model()
    assert {row.scan for row in replace(model, CROSS).rows} == {'cross'}
    assert 'cross' in str(describe(model))
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, path=path: seen.__setitem__(path, (m, *args, out)))
        for path, module in mixers(model)
    ]
    crossed = case.output(model)
    for handle in handles:
        handle.remove()
    assert seen.keys() == set(case.attentions)
    before = {'ViT': 1, 'DeiT': 2}.get(name, 0)
    for module, x, *_, out in seen.values():
        side = round((x.shape[1] - before) ** 0.5)
        states = reference(module, module.pre_proj(x), columns(before, side, side, 0))
        wanted = torch.cat([proj(s) for proj, s in zip(module.head_proj, states, strict=True)], -1)
        assert torch.allclose(out, wanted, rtol=0, atol=1e-12)
    raster = case.model()
    replace(raster, FAR)
    raster.load_state_dict(model.state_dict())
    assert not torch.allclose(case.output(raster), crossed, atol=1e-6)


def test_a_unet_knows_that_its_image_is_no_square() -> None:
    torch.manual_seed(0)
    model = randomise(unet()).double().eval()
    replace(model, CROSS)
    mixer = dict(mixers(model))['mid_block.attentions.0']
    seen: list[Any] = []
    mixer.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    sample = torch.randn(2, 1, 8, 16, dtype=torch.float64)
    model(sample, torch.tensor([3, 70]))
    x, size, out = seen[0]
    assert tuple(size) == (4, 8)
    states = reference(mixer, mixer.pre_proj(x), columns(0, 4, 8, 0))
    wanted = torch.cat([proj(s) for proj, s in zip(mixer.head_proj, states, strict=True)], -1)  # type: ignore[arg-type]
    assert torch.allclose(out, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ('scan', 'message'),
    [
        ('spiral', "unknown scan 'spiral': Known: cross, raster"),
        (dict(type='cross', rows=2), "takes no 'rows'"),
        (dict(type='cross', grid=4), r'grid=4 should be a pair \(rows, columns\)'),
        (dict(type='cross', grid=[2, 0]), r'grid=\[2, 0\] should be a pair'),
        (dict(type='cross', before=-1), 'before=-1, after=0 should be at least 0'),
        (dict(type='cross', before=True), 'should be a whole number'),
        (dict(type='raster', before=1), "takes no 'before'"),
        (5, 'FAR: scan=5 should be'),
    ],
)
def test_scans_that_are_none_are_refused(scan: Any, message: str) -> None:
    model = vit()
    names = list(model.state_dict())
    with pytest.raises(PlugError, match=message):
        replace(model, {**FAR, 'scan': scan})
    assert list(model.state_dict()) == names


def test_tokens_that_are_no_grid_are_refused_with_what_to_do() -> None:
    with pytest.raises(PlugError, match='0: FAR: scan=.cross. needs 2 heads'):
        replace(nn.Sequential(Block().attn), {**CROSS, 'layers': ['0'], 'heads': 1})
    model = nn.Sequential(Block())
    replace(model, {**CROSS, 'layers': ['*.attn']})
    x = torch.randn(2, 7, 16)
    with pytest.raises(PlugError, match='7 tokens, 0 in front and 0 behind, are not a square grid; say where it is'):
        model(x)
    given = nn.Sequential(Block())
    replace(given, {**CROSS, 'layers': ['*.attn'], 'scan': dict(type='cross', grid=(3, 2), before=1)})
    assert given(x).shape == x.shape
    with pytest.raises(PlugError, match='9 tokens, 1 in front and 0 behind, are not a grid of 3 x 2'):
        given(torch.randn(2, 9, 16))


def test_pruned_cross_models_are_the_masked_ones_and_survive_saving(tmp_path: Path) -> None:
    case = CASES['ViT']
    model = case.model()
    replace(model, {**FAR, 'scan': dict(type='cross', grid=(2, 2))})
    randomise(model)
    masked, found = copy.deepcopy(model), scores(model)
    kept = units_above(found, float(torch.cat([*found.values()]).median()))
    mask_units(masked, kept)
    assert torch.allclose(case.output(masked), case.output(shrink_of(model, kept)), rtol=0, atol=1e-10)
    assert not torch.allclose(case.output(masked), case.output(model), atol=1e-3)
    far.cut(model, far.Budget('units', 0.5))
    again = load_far(save_far(model, tmp_path / 'far'))
    assert {row.scan for row in describe(again).rows} == {'cross'}
    assert torch.equal(case.output(again), case.output(model))


def shrink_of(model: nn.Module, kept: Any) -> nn.Module:
    smaller = copy.deepcopy(model)
    shrink(smaller, kept)
    return smaller


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ViT', 'UNet2DModel'])
def test_cross_models_export_and_compile(name: str) -> None:
    from test_far_export import First  # type: ignore[import-not-found]

    case = CASES[name]
    model = case.build()
    replace(model, CROSS)
    model, inputs = First(randomise(model)).eval(), case.inputs()
    with torch.no_grad():
        wanted = model(**inputs)
        exported = torch.export.export(model, (), inputs, strict=False).module()
        assert torch.allclose(exported(**inputs), wanted, atol=1e-5, rtol=1e-4)
        if name == 'ViT':
            traced = torch.jit.trace(model.model, inputs['pixel_values'], strict=False, check_trace=False)
            assert torch.allclose(traced(inputs['pixel_values'])['logits'], wanted, atol=1e-5, rtol=1e-4)
            compiled = torch.compile(model, backend='eager')
            assert torch.allclose(compiled(**inputs), wanted, atol=1e-5, rtol=1e-4)


def test_specs_without_a_scan_read_row_by_row() -> None:
    model = vit()
    replace(model, FAR)
    assert {row.scan for row in describe(model).rows} == {'raster'}
    assert 'scan' not in model.replace_spec
