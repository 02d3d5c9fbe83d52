"""Multi-head LSTMs and their places: counts, equal executions, kept weights, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.far import CASES, FAR, Block, Case, vit
from torch import Tensor, nn

from asr_downstream.errors import PlugError
from asr_downstream.far import MultiHeadLSTM, describe, replace
from asr_downstream.far.distil.loss import Features
from asr_downstream.far.model.autotune import tune
from asr_downstream.far.model.backends import ENOUGH, EXECUTIONS, multiply_adds, pick
from asr_downstream.far.model.head import HeadLSTM, from_dense, to_dense
from asr_downstream.far.model.replace import find_attentions
from asr_downstream.measure import cost

case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def spec_of(case: Case, **changes: Any) -> dict[str, Any]:
    return {**FAR, 'layers': case.layers, **changes}


@pytest.mark.parametrize(
    ('channels', 'heads', 'variant', 'parameters', 'mmacs'),
    [
        (192, 3, 'M3', 298_560, 58.1), (384, 6, 'M3', 744_576, 145.2), (768, 12, 'M3', 2_078_976, 406.7),
        (192, 3, 'M2', 298_560, 58.1), (192, 3, 'M1', 310_656, 60.5), (384, 6, 'M1', 842_496, 164.6),
    ],
)  # fmt: skip
def test_parameters_and_multiply_adds_are_those_of_the_paper(
    channels: int, heads: int, variant: str, parameters: int, mmacs: float
) -> None:
    module: nn.Module = MultiHeadLSTM(channels, heads, variant)
    if variant != 'M1':  # with the teacher's projection, or one of its size
        module = nn.Sequential(module, nn.Linear(channels, channels))
    assert cost.parameters(module) == parameters
    x = torch.randn(1, 197, channels)
    assert cost.gmacs(lambda: module(x)) * 1e3 == pytest.approx(mmacs, abs=0.06)


@pytest.mark.parametrize('widths', [None, [(3, 5), (8, 0), (0, 0), (2, 2)]], ids=['even', 'pruned'])
@pytest.mark.parametrize('variant', ['M1', 'M3'])
def test_executions_give_equal_outputs_and_gradients(widths: Any, variant: str) -> None:
    module = randomise(MultiHeadLSTM(32, 4, variant, widths)).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for name in EXECUTIONS:
        module.execution = name
        module.zero_grad()
        out = module(x)
        out.square().sum().backward()
        found[name] = out.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]
    for name, (out, grads) in found.items():
        assert torch.allclose(out, found['loop'][0], rtol=1e-10, atol=1e-12), name
        for a, b in zip(grads, found['loop'][1], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-11), name


def test_a_masked_dense_lstm_is_the_heads() -> None:
    heads, size, width = 3, 4, 12
    module = randomise(MultiHeadLSTM(width, heads)).double()
    dense = nn.LSTM(width, width, batch_first=True, bidirectional=True).double()
    with torch.no_grad():
        for number, end in enumerate(('_l0', '_l0_reverse')):
            joined = to_dense([head.directions[number] for head in module.heads])
            for kind in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'):
                getattr(dense, kind + end).copy_(getattr(joined, kind))
    x = torch.randn(2, 9, width, dtype=torch.float64)
    states = torch.stack([s.unflatten(-1, (2, size)) for s in module.states(x)], 2)  # B, N, heads, 2, size
    assert torch.allclose(dense(x)[0].unflatten(-1, (2, heads, size)).transpose(2, 3), states, atol=1e-12)
    for split, head in zip(from_dense(dense, heads), module.heads, strict=True):
        for a, b in zip(split.parameters(), head.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_mask_laid_out_head_by_head_is_refused() -> None:
    dense = nn.LSTM(12, 12, bidirectional=True)
    mask = torch.block_diag(*[torch.ones(16, 4)] * 3)
    with torch.no_grad():
        for name in ('weight_ih_l0', 'weight_hh_l0', 'weight_ih_l0_reverse', 'weight_hh_l0_reverse'):
            getattr(dense, name).mul_(mask)
    with pytest.raises(ValueError, match='outside of the blocks'):
        from_dense(dense, 3)


def test_training_heads_is_training_a_dense_lstm_with_masked_gradients() -> None:
    module = randomise(MultiHeadLSTM(8, 2)).double()
    module.execution = 'dense'
    dense = nn.LSTM(8, 8, batch_first=True, bidirectional=True).double()
    ends = ('_l0', '_l0_reverse')
    with torch.no_grad():
        for number, end in enumerate(ends):
            joined = to_dense([head.directions[number] for head in module.heads])
            for kind in ('weight_ih', 'weight_hh', 'bias_ih', 'bias_hh'):
                getattr(dense, kind + end).copy_(getattr(joined, kind))
    masks = {name: (value != 0).double() for name, value in dense.named_parameters()}
    settings = {'lr': 1e-2, 'weight_decay': 0.05}
    optimisers = [torch.optim.AdamW(m.parameters(), **settings) for m in (module.heads, dense)]
    for step in range(4):
        x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for optimiser in optimisers:
            optimiser.zero_grad()
        torch.cat([s.square().flatten() for s in module.states(x)]).mean().backward()
        dense(x)[0].square().mean().backward()
        for name, value in dense.named_parameters():
            assert value.grad is not None
            value.grad.mul_(masks[name])
        for optimiser in optimisers:
            optimiser.step()
    for number, end in enumerate(ends):
        joined = to_dense([head.directions[number] for head in module.heads])
        for kind in ('weight_ih', 'weight_hh'):
            trained = getattr(dense, kind + end)
            assert torch.allclose(getattr(joined, kind), trained, atol=1e-10)
            assert trained[masks[kind + end] == 0].count_nonzero() == 0
            assert joined[('weight_ih', 'weight_hh').index(kind)][masks[kind + end] == 0].count_nonzero() == 0


def test_the_class_token_sees_patches_through_the_backward_direction_alone() -> None:
    module = randomise(MultiHeadLSTM(8, 2)).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    for half, sees in ((slice(0, 4), False), (slice(4, 8), True)):
        (grad,) = torch.autograd.grad(module.states(x)[0][0, 0, half].sum(), x)
        assert bool(grad[0, 1:].any()) == sees
        assert grad[0, 0].any()


@case
def test_a_stand_in_with_the_outputs_of_the_heads_is_the_teacher(case: Case) -> None:
    """Everything but the LSTMs is the teacher's: given its heads' outputs, the output is the teacher's, bit by bit."""
    if not case.heads_seen:
        pytest.skip('its projection is not called as a module')
    teacher = case.model()
    places = find_attentions(teacher, case.layers)
    assert [place.path for place in places] == list(case.attentions)
    with Features(teacher, places, 'heads') as seen, torch.no_grad():
        wanted = case.output(teacher)
    student = copy.deepcopy(teacher)
    replace(student, spec_of(case))
    assert not torch.allclose(case.output(student), wanted)
    for (_, module), place in zip(mixers_of(student), places, strict=True):
        module.forward = lambda x, size=None, path=place.path: seen.found[path]  # type: ignore[method-assign]
    assert torch.equal(case.output(student), wanted)


def mixers_of(model: nn.Module) -> list[tuple[str, MultiHeadLSTM]]:
    from asr_downstream.far.model.describe import mixers

    return list(mixers(model))


@case
@pytest.mark.parametrize('variant', ['M1', 'M2', 'M3'])
def test_replacing_leaves_the_rest_as_it_is(case: Case, variant: str) -> None:
    teacher = case.model()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    generator = torch.get_rng_state()
    table = replace(teacher, spec_of(case, variant=variant))
    assert torch.equal(torch.get_rng_state(), generator)
    assert [row.path for row in table.rows] == list(case.attentions)
    after = teacher.state_dict()
    kept = [name for name in before if name in after and any(name.startswith(f'{p}.') for p in case.attentions)]
    for name in before.keys() - set(kept):
        inside = any(name.startswith(f'{p}.') for p in case.attentions)
        assert (name not in after) if inside else torch.equal(after[name], before[name]), name
    if variant == 'M3':  # the output projection, and norms that an attention holds
        assert all(torch.equal(after[name], before[name]) for name in kept)
        assert len(kept) >= 2 * len(case.attentions)
    out = case.output(teacher)
    assert out.isfinite().all()
    out.square().sum().backward()
    for path, mixer in mixers_of(teacher):
        assert all(p.grad is not None for p in mixer.parameters()), path
        assert mixer.pre_proj.weight.grad.any(), path


def test_a_subset_of_layers_by_number_and_by_name() -> None:
    for layers in ([1], ['vit.layers.1.*']):
        model = vit(layers=3)
        if layers == ['vit.layers.1.*']:
            with pytest.raises(PlugError, match='no output projection'):
                replace(model, {**FAR, 'layers': layers})
            layers = ['vit.layers.1.attention']
        untouched = model.vit.layers[0]
        table = replace(model, {**FAR, 'layers': layers})
        assert [row.path for row in table.rows] == ['vit.layers.1.attention']
        assert model.vit.layers[0] is untouched
        assert not mixers_of(model.vit.layers[0])


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ({'type': 'LSTM'}, "expected dict\\(type='FAR'"),
        ({**FAR, 'layer': 'all'}, "did you mean 'layers'"),
        ({**FAR, 'variant': 'M9'}, "vit.layers.0.attention: FAR: variant='M9' is not known"),
        ({**FAR, 'execution': 'thread'}, "did you mean 'threads'"),
        ({**FAR, 'layers': [5]}, 'there are 2 self-attentions'),
        ({**FAR, 'layers': ['encoder.*']}, 'nothing in ViTForImageClassification matches'),
        ({**FAR, 'layers': 'first'}, 'should be'),
        ({**FAR, 'layers': ['vit.layers.*.mlp']}, "give its path inside the module, projection='...'"),
        ({**FAR, 'layers': ['vit.layers.*.mlp'], 'projection': 'fc2'}, 'give heads='),
        ({**FAR, 'layers': ['vit.layers.0.attention'], 'heads': 3}, 'cannot be split into 3 heads'),
        ({**FAR, 'widths': {'vit.layers.9.attention': []}}, 'not replaced here'),
        ({**FAR, 'widths': {'vit.layers.0.attention': [[1, 2]]}}, 'should be 2 pairs'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(spec: dict[str, Any], message: str) -> None:
    model = vit()
    before = list(model.state_dict())
    with pytest.raises(PlugError, match=message):
        replace(model, spec)
    assert list(model.state_dict()) == before


def test_models_without_replaceable_attention_say_why() -> None:
    with pytest.raises(PlugError, match='has no self-attention that is known'):
        replace(nn.Linear(2, 2), FAR)
    biased = Block()
    biased.attn.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    with pytest.raises(PlugError, match='relative positions'):
        replace(nn.Sequential(biased), {**FAR, 'layers': ['0.attn']})
    model = vit()
    replace(model, FAR)
    with pytest.raises(PlugError, match='has replacements already'):
        replace(model, FAR)


def test_cross_attention_and_masks_are_refused() -> None:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        cross_attention_dim=6, attention_head_dim=8,
    )  # fmt: skip
    with pytest.raises(PlugError, match='is cross-attention'):
        replace(model, {**FAR, 'layers': ['*.attn2']})
    table = replace(model, FAR)
    assert len(table.rows) == 4
    assert all(row.path.endswith('attn1') for row in table.rows)
    encoder = CASES['TransformerEncoder'].build().eval()
    replace(encoder, FAR)
    x = torch.randn(2, 5, 16)
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert encoder(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)).isfinite().all()
    with pytest.raises(PlugError, match='mask that hides tokens'):
        encoder(x, src_key_padding_mask=hidden)
    with pytest.raises(PlugError, match='query and key differ'):
        encoder.layers[0].self_attn(x, x + 1, x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    module = MultiHeadLSTM(16, 2)
    x = torch.randn(2, 6, 16)
    wanted = module(x)
    whole = copy.deepcopy(module).to(dtype)(x.to(dtype))
    assert whole.dtype == dtype
    assert torch.allclose(whole.float(), wanted, atol=2e-2)
    with torch.autocast('cpu', dtype):
        states = module.states(module.pre_proj(x))
        mixed = module(x)
    assert states[0].dtype == torch.float32  # the recurrences stay in the dtype of their weights
    assert mixed.dtype == dtype
    assert torch.allclose(mixed.float(), wanted, atol=2e-2)
    mixed.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_describe_states_the_rule_and_tune_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    assert 'no attention is replaced' in str(describe(model))
    table = replace(model, FAR)
    assert 'auto on cpu: ' in str(table)
    assert 'threads without gradients from 50 million' in ' '.join(str(table).split())
    assert table.rows[0].units == table.rows[0].full == 32
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, 'get_num_threads', lambda: 2)
        assert [pick(cpu, work) for work in (ENOUGH - 1, ENOUGH)] == ['loop', 'threads']
        assert pick(cuda, ENOUGH) == 'loop'
        with torch.enable_grad():
            assert pick(cpu, ENOUGH) == 'loop'
    heads = [HeadLSTM(64, (64, 64), 0.1) for _ in range(6)]
    assert multiply_adds(heads, 197) == 197 * 6 * 2 * 4 * 64 * 128
    inputs = CASES['ViT'].inputs()
    times = tune(model, lambda: model(**inputs), rounds=1, names=('loop', 'scan'))
    best = min(times, key=lambda name: times[name])
    assert {row.execution for row in describe(model).rows} == {best}
    assert 'execution' not in model.replace_spec  # it is of this machine
    with pytest.raises(PlugError, match='nothing to tune'):
        tune(vit(), lambda: None)


def test_training_moves_only_what_learns() -> None:
    from asr_downstream.far.model.trainable import learning

    for learns, blocks in (('replacements', False), ('blocks', True)):
        model = vit()
        replace(model, {**FAR, 'layers': [1]})
        learning(model, learns)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(name.startswith('vit.layers.1.') for name in names)
        assert any('mlp' in name for name in names) == blocks
        assert all('mixer' in name for name in names) != blocks
    fresh = vit()
    replace(fresh, {**FAR, 'variant': 'M2'})
    learning(fresh, 'replacements')
    assert fresh.vit.layers[0].attention.o_proj.weight.requires_grad
