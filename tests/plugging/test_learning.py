"""What learns: words, patterns, counts; and that a restricted model changes nothing else, whatever is done to it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.learning import DIA, SRM, changed, freezing, made, state_of, step
from helpers.plugged import ASR, CLASSIC, X, tiny
from torch import Tensor, nn

from asr_downstream import describe, plug
from asr_downstream.errors import PlugError
from asr_downstream.measure.cost import optimiser_bytes
from asr_downstream.modules.slots import GATES
from asr_downstream.plugging.gating.gates import Gate
from asr_downstream.plugging.learning.choose import choose
from asr_downstream.plugging.learning.restrict import release, restrict, trained_beside_gates, warn_of_another_start

IS_NORM = ('bn1', 'bn2', 'bn3', 'downsample.1')
LEARNT = {
    'gates': lambda name: bool(GATES.search(name)),
    'norms': lambda name: name.rpartition('.')[0].endswith(IS_NORM),
    'gates+norms': lambda name: bool(GATES.search(name)) or name.rpartition('.')[0].endswith(IS_NORM),
    'bias': lambda name: name.endswith('.bias') and not GATES.search(name),
    'fc.*': lambda name: name.startswith('fc.'),
}


@pytest.mark.parametrize('spec', [ASR, DIA, CLASSIC, SRM], ids=lambda s: f'{s["type"]}-{s["attention"]["type"]}')
@pytest.mark.parametrize('learns', LEARNT)
def test_only_what_was_named_changes(spec: Any, learns: str) -> None:
    model = randomise(made(spec))
    restrict(model, choose(model, learns))
    before = state_of(model)
    optimiser = step(model)
    parameters = {name for name, _ in model.named_parameters()}
    expected = {name for name in parameters if LEARNT[learns](name)}
    found = changed(model, before)
    assert found & parameters == expected
    statistics = {name.rpartition('.')[0] for name in found - parameters}  # running_mean, ...
    of_learning = {n.rpartition('.')[0] for n in expected if n.rpartition('.')[0] + '.running_mean' in before}
    assert statistics == of_learning
    assert all(p.grad is None for n, p in model.named_parameters() if n not in expected)
    own = {id(p) for n, p in model.named_parameters() if n in expected}
    assert {id(p) for p in optimiser.state} == own


def test_all_restricts_nothing() -> None:
    model = randomise(made())
    kind = type(model)
    learning = choose(model)
    restrict(model, learning)
    assert type(model) is kind
    assert describe(model).learning is None
    assert learning.numbers == learning.total == sum(p.numel() for p in model.parameters())
    before = state_of(model)
    step(model)
    assert {n for n in before if not n.endswith('reference')} == changed(model, before)


def test_statistics_run_where_that_is_asked_for() -> None:
    model = randomise(made())
    restrict(model, choose(model, 'gates', statistics='running'))
    before = state_of(model)
    step(model)
    assert {n for n in before if 'running_' in n} <= changed(model, before)
    with pytest.raises(PlugError, match="statistics='runing' is not known; did you mean 'running'"):
        choose(model, 'gates', statistics='runing')


def test_the_start_is_the_base_in_training_mode_too() -> None:
    stock = randomise(tiny()).eval()
    model = made(ASR)
    model.load_state_dict(stock.state_dict(), strict=False)
    x = torch.randn(X)
    assert not torch.equal(copy.deepcopy(model)(x), stock(x))  # statistics of the batch
    restrict(model, choose(model, 'gates'))
    assert torch.equal(model.train()(x), stock(x))


@pytest.mark.parametrize('spec', [ASR, DIA, CLASSIC], ids=lambda spec: spec['type'])
def test_gradients_are_those_of_a_model_in_which_all_learn(spec: Any) -> None:
    one = randomise(made(spec)).double().eval()
    other = copy.deepcopy(one)
    restrict(one, choose(one, 'gates'))
    x = torch.randn(X, dtype=torch.float64)
    one.train()(x).square().mean().backward()
    other(x).square().mean().backward()
    found = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    expected = dict(other.named_parameters())
    assert found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-10, atol=1e-14, msg=name)


def test_gates_learn_in_what_the_model_freezes_and_nothing_else_does() -> None:
    model = randomise(freezing(SRM))
    learning = choose(model, 'gates')
    assert any(name.startswith('layer1.') for name in learning.names)
    restrict(model, learning)
    before = state_of(model)
    step(model)
    inside = {name for name in changed(model, before) if name.startswith('layer1.')}
    gates = {name for name, p in model.named_parameters() if name.startswith('layer1.') and GATES.search(name)}
    assert gates
    assert {name for name in inside if not name.endswith(('_mean', '_var', '_tracked'))} == gates
    assert all(gate.training for gate in model.layer1.modules() if isinstance(gate, Gate))
    assert any('dynamic' in name and name.endswith('running_mean') for name in inside)  # norms of the attention learn


def test_what_the_model_freezes_stays_frozen_unless_a_pattern_names_it() -> None:
    model = freezing()
    assert not any(n.startswith('layer1.') for n in choose(model, 'norms').names)
    learning = choose(model, ['gates', 'layer1.0.bn1.*'])
    restrict(model, learning)
    before = state_of(model)
    step(model)
    assert {'layer1.0.bn1.weight', 'layer1.0.bn1.bias'} <= changed(model, before)
    assert 'layer1.1.bn1.weight' not in changed(model, before)
    release(model)
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())
    model.requires_grad_(False)
    with pytest.raises(PlugError, match="learns='norms': the model itself has frozen all of them"):
        choose(model, 'norms')


def test_numbers_and_bytes_are_counted() -> None:
    model = made()
    learning = choose(model, 'gates')
    params = dict(model.named_parameters())
    own = {n: p for n, p in params.items() if GATES.search(n)}
    rest = sum(p.numel() for p in params.values()) - sum(p.numel() for p in own.values())
    assert learning.numbers == sum(p.numel() for p in own.values())
    assert learning.total == learning.numbers + rest
    assert (learning.gradients, learning.gradients_saved) == (4 * learning.numbers, 4 * rest)
    assert choose(copy.deepcopy(model).double(), 'gates').gradients_saved == 8 * rest
    found = learning.measured(model, torch.optim.AdamW)
    everything = sum(t.nbytes for s in step(model, 1).state.values() for t in s.values())
    restrict(model, found)
    kept = sum(t.nbytes for s in step(model, 1).state.values() for t in s.values())
    assert (found.state, found.state_saved) == (kept, everything - kept)
    line = str(describe(model)).splitlines()[-1]
    assert line.startswith(f'learns gates: {len(own)} weights, {learning.numbers:,} of {learning.total:,} numbers (')
    saved = f'{found.state_saved / 1000:.3g} kB of the state of the optimiser'
    assert f'saves {4 * rest / 1000:.3g} kB of gradients and {saved}; ' in line
    assert line.endswith('statistics of norms that do not learn are frozen')


@pytest.mark.parametrize(
    ('make', 'a_number'),
    [
        (lambda p: torch.optim.SGD(p, 0.1), 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 4),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 12),
        (lambda p: torch.optim.Adam([{'params': p[:1]}, {'params': p[1:], 'lr': 1.0}]), 8),
    ],
)
def test_the_state_of_an_optimiser_is_what_it_is_after_a_step(make: Any, a_number: int) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 7))
    optimiser = make(list(model.parameters()))
    model(torch.randn(2, 30)).sum().backward()
    optimiser.step()
    kept = sum(t.nbytes for s in optimiser.state.values() for t in s.values() if isinstance(t, Tensor))
    assert optimiser_bytes(model.parameters(), make) == kept
    beside = kept - a_number * sum(p.numel() for p in model.parameters())
    assert beside in (0, 4 * len([*model.parameters()]))  # a count of steps each


class LooksAtValues(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]['params'][0].norm().item() >= 0


def test_of_an_optimiser_that_looks_at_values_nothing_is_said() -> None:
    model = made()
    learning = choose(model, 'gates').measured(model, lambda p: LooksAtValues(p, 0.1))
    assert learning.state is None
    assert 'of the optimiser' not in str(learning)
    assert 'of gradients' in str(learning)
    assert optimiser_bytes([], torch.optim.AdamW) == 0


@pytest.mark.parametrize(
    ('learns', 'message'),
    [
        ('gates', "learns='gates': ResNet has no gates, it is a stock model; name an attention, plug=dict"),
        (['fc.*', 'gates'], "learns='gates': ResNet has no gates"),
        ('gate', r"'gate' matches no weight of ResNet; did you mean 'gates'\?"),
        ('norms+biass', r"'biass' matches no weight of ResNet; did you mean 'bias'\?"),
        ('layer1.0', r"'layer1.0' matches no weight of ResNet; below it are .*: 'layer1.0.\*'"),
        ('fc.wieght', 'matches no weight of ResNet; the nearest are fc.weight'),
        ('', r"learns='' should be 'all', 'gates', 'norms', 'bias', a pattern"),
        ([], r'learns=\[\] should be'),
        (None, 'learns=None should be'),
        ([1], r'learns=\[1\] should be'),
    ],
)
def test_what_means_nothing_is_refused(learns: Any, message: str) -> None:
    model = tiny()
    with pytest.raises(PlugError, match=message):
        choose(model, learns)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_norms_or_biases_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    for word, text in (('norms', 'has no norms with weights'), ('bias', 'has no biases')):
        with pytest.raises(PlugError, match=f"learns='{word}': Sequential {text}"):
            choose(model, word)


class RMSNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3))
        self.mix = nn.Parameter(torch.ones(3, 3))


class NormedLinear(nn.Linear):
    """Not a norm, whatever its name begins with."""


def test_norms_of_others_are_known_by_their_names() -> None:
    model = nn.Sequential(RMSNorm2d(), NormedLinear(3, 3), nn.GroupNorm(1, 3), nn.LayerNorm((3, 3)))
    names = choose(model, 'norms').names
    assert names == ('0.gamma', '2.weight', '2.bias', '3.weight', '3.bias')


def test_new_weights_learn_as_well_and_are_named() -> None:
    model = made()
    learning = choose(model, 'gates', new=['fc.weight', 'fc.bias', 'layer1.0.bn1.running_mean'])
    assert learning.new == ('fc.weight', 'fc.bias')
    assert {'fc.weight', 'fc.bias'} < set(learning.names)
    assert 'new, and so among them: fc.weight, fc.bias' in str(learning)


def test_a_weight_that_two_layers_share_learns_by_either_name() -> None:
    model = nn.ModuleDict({'a': nn.Linear(3, 3), 'b': nn.Linear(3, 3), 'c': nn.Linear(3, 3)})
    model['b'].weight = model['a'].weight
    learning = choose(model, 'b.weight')
    assert learning.names == ('a.weight',)
    assert learning.numbers == 9
    assert learning.gradients_saved == 4 * (9 + 3 * 3)


def test_gates_that_do_not_start_at_one_are_said() -> None:
    model = tiny()
    plug(model, ASR)
    with pytest.warns(UserWarning, match=r'gates of layer1.0.bn3.gate.0, .* do not start at 1, .* preserve=True'):
        warn_of_another_start(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_of_another_start(made())


def test_what_changes_beside_gates_is_known_with_its_statistics() -> None:
    model = made()
    restrict(model, choose(model, ['gates', 'layer1.0.bn1.*', 'fc.bias']))
    own = ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    assert set(trained_beside_gates(model)) == {'fc.bias', *(f'layer1.0.bn1.{name}' for name in own)}
    before = state_of(model)
    step(model)
    assert {name for name in changed(model, before) if not GATES.search(name)} == set(trained_beside_gates(model))
