"""Linear attention in the place of attention, the control of the LSTMs: formula, cost, stages, folders, exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import command, randomise
from helpers.far import CASES, FAR, Case, vit, write_config
from torch import nn

from asr_downstream import far
from asr_downstream.errors import AsrError, PlugError
from asr_downstream.far import describe, load_far, replace, save_far, tune
from asr_downstream.far.config import load_config
from asr_downstream.far.distil.stages import run_stages
from asr_downstream.far.evaluation.token_relations import influence, mixer_maps
from asr_downstream.far.family import prune_family, ship_trained
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.linear import MultiHeadLinear
from asr_downstream.far.model.lstm import MultiHeadLSTM
from asr_downstream.far.model.mixer import Mixer
from asr_downstream.measure import cost

LINEAR = {**FAR, 'mixer': 'linear'}


@pytest.mark.parametrize('out', [12, 18])
def test_it_is_attention_with_the_map_of_katharopoulos(out: int) -> None:
    torch.manual_seed(0)
    module = randomise(MultiHeadLinear(12, 3, out_channels=out)).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    found = module(x)
    assert found.shape == (2, 7, out)
    size = out // 3
    for head, part in enumerate(found.split(size, -1)):
        q, k, v = (
            layer(x)[..., head * size : (head + 1) * size] for layer in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
        weights = q @ k.mT  # every token looks at every one, later ones too
        wanted = (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)
        assert torch.allclose(part, wanted, rtol=0, atol=1e-12)
        softmax = (q @ k.mT).softmax(-1) @ v
        assert not torch.allclose(part, softmax, atol=1e-2)


def test_tokens_have_no_order_and_cost_grows_with_their_number_alone() -> None:
    module = randomise(MultiHeadLinear(12, 3)).double()
    x, order = torch.randn(2, 9, 12, dtype=torch.float64), torch.randperm(9)
    assert torch.allclose(module(x[:, order]), module(x)[:, order], rtol=0, atol=1e-12)
    costs = [cost.gmacs(lambda n=n: module(torch.randn(1, n, 12, dtype=torch.float64))) for n in (50, 100, 200)]  # type: ignore[misc]
    assert costs[1] == pytest.approx(2 * costs[0], rel=1e-2)
    assert costs[2] == pytest.approx(4 * costs[0], rel=1e-2)


def test_attention_costs_what_its_products_cost_however_it_runs() -> None:
    """The operators of the CPU for attention, and the fast path of torch's module, are in no counter of torch."""
    images, sizes = torch.randn(2, 3, 32, 32), dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.ViTConfig(image_size=32, patch_size=4, intermediate_size=32, **sizes)
    found = []
    for implementation in ('sdpa', 'eager'):
        config._attn_implementation = implementation
        model = transformers.ViTForImageClassification(config).eval()
        found.append(cost.gmacs(lambda model=model: model(images)))  # type: ignore[misc]
    assert found[0] == found[1]
    module, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 10, 16)
    expected = 2 * (4 * 10 * 16 * 16 + 2 * 10 * 10 * 16) / 1e9
    assert cost.gmacs(lambda: module(x, x, x, need_weights=False)) == pytest.approx(expected)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_parameters_are_those_of_the_attention(case: Case) -> None:
    model = case.model()
    before = cost.parameters(model)
    table = replace(model, {**LINEAR, 'layers': case.layers})
    assert cost.parameters(model) == before or case.build.__name__ == 'dit'
    assert [row.path for row in table.rows] == list(case.attentions)
    assert {(row.mixer, row.scan, row.execution, row.units, row.full) for row in table.rows} == {
        ('linear', '', '', 0, 0)
    }
    text = ' '.join(str(table).split())
    assert 'linear' in text
    assert 'no order' in text
    assert 'auto on' not in text
    assert 'units' not in text.partition('┏')[0]
    out = case.output(model)
    out.square().sum().backward()
    for _, mixer in mixers(model):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
        assert mixer.q_proj.weight.grad.any()


@pytest.mark.parametrize('kind', [MultiHeadLSTM, MultiHeadLinear])
def test_relations_are_gradients_of_each_head(kind: type[Mixer]) -> None:
    module, tokens = randomise(kind(6, 2, 'M3')).double(), torch.randn(1, 4, 6, dtype=torch.float64)
    wanted = 0
    for head in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda x, head=head: module.outputs(x)[head].sum(-1)[0], tokens)
        wanted = wanted + jacobian[:, 0].abs().sum(-1)
    found = influence(module, tokens)[0]
    assert torch.allclose(found, wanted / wanted.sum(-1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sums_over_many_tokens_hold_in_lower_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = MultiHeadLinear(16, 2)
    with torch.no_grad():
        module.k_proj.bias.fill_(40.0)  # the sum of 4,000 tokens is beyond what float16 can hold
    x = torch.randn(1, 4000, 16)
    wanted = module(x)
    whole = copy.deepcopy(module).to(dtype)(x.to(dtype))
    assert whole.dtype == dtype
    assert torch.allclose(whole.float(), wanted, atol=2e-2)
    with torch.autocast('cpu', dtype):
        mixed = module(x)
    assert mixed.dtype == dtype
    assert torch.allclose(mixed.float(), wanted, atol=2e-2)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'mixer': 'softmax'}, "unknown mixer 'softmax': did you mean 'lstm'"),
        ({'mixer': 5}, "mixer=5 should be 'lstm' or 'linear'"),
        ({'mixer': 'linear', 'scan': 'cross'}, "mixer='linear' takes no 'scan'"),
        ({'mixer': 'linear', 'execution': 'loop'}, "mixer='linear' takes no 'execution'"),
        ({'mixer': 'linear', 'widths': {'vit.layers.0.attention': [[1, 1], [1, 1]]}}, "takes no 'widths'"),
        ({'mixer': 'linear', 'variant': 'M1'}, "variant='M1' is of LSTMs; mixer='linear' has M2 or M3"),
    ],
)
def test_what_is_of_lstms_is_refused(spec: dict[str, Any], message: str) -> None:
    model = vit()
    names = list(model.state_dict())
    with pytest.raises(PlugError, match=message):
        replace(model, {**FAR, **spec})
    assert list(model.state_dict()) == names


def test_there_is_nothing_to_prune_or_tune() -> None:
    model = vit()
    replace(model, LINEAR)
    with pytest.raises(AsrError, match="mixer='linear' has no hidden units to prune"):
        far.cut(model, far.Budget('units', 0.5))
    with pytest.raises(PlugError, match='nothing to tune'):
        tune(model, lambda: None)


def test_folders_have_all_of_it(tmp_path: Path) -> None:
    case = CASES['ViT']
    model = case.model()
    replace(model, LINEAR)
    randomise(model)
    again = load_far(save_far(model, tmp_path / 'far'))
    assert torch.equal(case.output(again), case.output(model))
    text = (tmp_path / 'far' / 'README.md').read_text()
    assert 'replaced by linear attention (arXiv 2006.16236)' in text
    assert 'hidden units' not in text


@pytest.mark.parametrize('name', ['ViT', pytest.param('UNet2DModel', marks=pytest.mark.slow)])
def test_exported_and_compiled_models_compute_the_same(name: str) -> None:
    from test_far_export import First  # type: ignore[import-not-found]

    case = CASES[name]
    model: nn.Module = case.build()
    replace(model, LINEAR)
    model, inputs = First(randomise(model)).eval(), case.inputs()
    with torch.no_grad():
        wanted = model(**inputs)
        exported = torch.export.export(model, (), inputs, strict=False).module()
        assert torch.allclose(exported(**inputs), wanted, atol=1e-5, rtol=1e-4)
        assert torch.allclose(torch.compile(model, backend='eager')(**inputs), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_stages_train_it_and_pruning_says_no(tmp_path: Path) -> None:
    path = write_config(tmp_path, replace=LINEAR, max_train_steps=3, validation_steps=0)
    config, out = load_config(path), tmp_path / 'out'
    run_stages(config, out)
    ship_trained(config, out)
    model = load_far(out / 'shipped' / 'FAR-100')
    assert {row.mixer for row in describe(model).rows} == {'linear'}
    maps = mixer_maps(model, {'pixel_values': torch.randn(1, 1, 8, 8)})
    assert all(torch.allclose(found.sum(-1), torch.ones(1, 5), atol=1e-5) for found in maps.values())
    with pytest.raises(AsrError, match="has no hidden units to prune; use mixer='lstm'"):
        prune_family(config, out, [far.Budget('units', 0.5)])
    assert not (out / 'sparse').exists()
    done = command('evaluate_far', out, '--rounds', 2, '--relations', 2, '--sweep', '--tokens', 16, '--batches', 1)
    assert done.returncode == 0, done.stderr
    regularised = load_config(path, {'stages.1.hoyer': 0.1})
    with pytest.raises(AsrError, match='hoyer=0'):
        run_stages(regularised, tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
