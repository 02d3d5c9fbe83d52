"""The operator of the LSTMs: its outputs, when it runs, what runs without it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise
from helpers.far import CASES, FAR, vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asr_downstream.errors import AsrError
from asr_downstream.far import MultiHeadLSTM, describe, load_far, replace, save_far, tune
from asr_downstream.far.model import autotune, backends
from asr_downstream.far.model.backends import choose, fits, plan
from asr_downstream.far.model.ops import build
from asr_downstream.far.model.ops.lstm import DTYPES, Operator, lstm_heads, operator

ABSENT = Operator(False, 'its operator is not built: asr-downstream build-ops')
sizes = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope='module', autouse=True)
def _built() -> None:
    """Build it where it is not there; what needs it is left out where there is no compiler."""
    try:
        build.build()
    except AsrError as error:
        pytest.skip(str(error))
    operator.cache_clear()
    assert operator().there


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backends, autotune):
        monkeypatch.setattr(module, 'operator', lambda: ABSENT)


def states(module: MultiHeadLSTM, tokens: Tensor, execution: str) -> Tensor:
    module.execution = execution
    with torch.no_grad():
        return torch.cat(module.states(tokens), -1)


@sizes
@given(st.data())
def test_outputs_are_those_of_lstms(data: st.DataObject) -> None:
    heads, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    width = st.integers(0, 70)
    widths = data.draw(st.lists(st.tuples(width, width), min_size=heads, max_size=heads))
    batch, length = data.draw(st.integers(1, 11)), data.draw(st.integers(1, 300))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module, tokens = MultiHeadLSTM(heads * size, heads, widths=widths), torch.randn(batch, length, heads * size)
    for head in module.heads:
        for weight in head.weights():  # larger ones are chaotic: there float32 itself is off by more
            nn.init.uniform_(weight, -((size + max(head.widths)) ** -0.5), (size + max(head.widths)) ** -0.5)
    found = states(module, tokens, 'fused')
    assert found.shape == (batch, length, sum(map(sum, widths)))
    assert torch.allclose(found, states(module, tokens, 'loop'), rtol=0, atol=1e-6)


@sizes
@given(st.data())
def test_values_that_are_not_finite_go_where_they_go_in_lstms(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=2))
    batch, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 60))
    module, tokens = MultiHeadLSTM(18, 2, widths=widths), torch.randn(batch, length, 18)
    value = st.sampled_from([float('nan'), float('inf'), -float('inf'), 1e30, -1e30])
    for _ in range(data.draw(st.integers(1, 3))):
        place = [data.draw(st.integers(0, count - 1)) for count in tokens.shape]
        tokens[tuple(place)] = data.draw(value)
    found, wanted = states(module, tokens, 'fused'), states(module.double(), tokens.double(), 'loop').float()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e30])
@pytest.mark.parametrize('kind', range(4))
def test_weights_that_are_not_finite(kind: int, value: float) -> None:
    module, tokens = MultiHeadLSTM(8, 2, widths=[(5, 3), (8, 9)]), torch.randn(3, 6, 8)
    with torch.no_grad():
        module.heads[0].weights()[kind].view(-1)[2] = value
    found = states(module, tokens, 'fused')
    wanted = states(module.double(), tokens.double(), 'loop').float()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6, equal_nan=True)
    assert found.isnan().any() == wanted.isnan().any()


@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_lower_precision_is_float32_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    module = MultiHeadLSTM(48, 3, widths=[(16, 16), (7, 20), (0, 1)]).to(dtype)
    tokens = torch.randn(5, 70, 48).to(dtype)
    found = states(module, tokens, 'fused')
    assert found.dtype == dtype
    wanted = states(module.float(), tokens.float(), 'fused')
    assert torch.allclose(found.float(), wanted, rtol=0, atol=torch.finfo(dtype).eps)


def test_every_number_of_threads_gives_the_same_bits() -> None:
    module, before = MultiHeadLSTM(24, 3, widths=[(8, 8), (3, 20), (9, 0)]), torch.get_num_threads()
    try:
        for batch in (1, 2, 9, 40):
            tokens, found = torch.randn(batch, 17, 24), []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                found.append(states(module, tokens, 'fused'))
            assert all(torch.equal(found[0], other) for other in found)
    finally:
        torch.set_num_threads(before)


def test_tokens_and_weights_may_lie_in_any_order() -> None:
    module, tokens = MultiHeadLSTM(16, 2), torch.randn(3, 5, 16)
    wanted = states(module, tokens, 'loop')
    for other in (tokens.transpose(0, 1).contiguous().transpose(0, 1), tokens.transpose(1, 2).contiguous().mT):
        assert not other.is_contiguous()
        assert torch.allclose(states(module, other, 'fused'), wanted, rtol=0, atol=1e-6)
    for name, weight in module.heads.named_parameters():
        if 'weight' in name:
            weight.data = weight.data.t().contiguous().t()
    assert torch.allclose(states(module, tokens, 'fused'), wanted, rtol=0, atol=1e-6)


def test_nothing_in_gives_nothing_out() -> None:
    module = MultiHeadLSTM(16, 2, widths=[(0, 0), (3, 0)])
    assert states(module, torch.randn(0, 5, 16), 'fused').shape == (0, 5, 3)
    assert states(module, torch.randn(2, 0, 16), 'fused').shape == (2, 0, 3)
    module = MultiHeadLSTM(16, 2, widths=[(0, 0), (0, 0)])
    assert states(module, torch.randn(2, 5, 16), 'fused').shape == (2, 5, 0)


def arguments(dtype: torch.dtype = torch.float32) -> list[Any]:
    module = MultiHeadLSTM(16, 2, widths=[(3, 8), (0, 5)]).to(dtype).requires_grad_(False)
    weights = [weight for head in module.heads for weight in head.weights()]
    return [list(torch.randn(2, 6, 16, dtype=dtype).chunk(2, -1)), weights, *map(list, plan(tuple(module.widths)))]


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_operator_is_a_proper_one(dtype: torch.dtype) -> None:
    found = torch.library.opcheck(torch.ops.asr_downstream.lstm_heads, tuple(arguments(dtype)))
    assert set(found.values()) == {'SUCCESS'}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda a: a[0].clear(), 'no tokens'),
        (lambda a: a[2].pop(), 'expected a head, a direction and 4 weights for each LSTM'),
        (lambda a: a[2].__setitem__(0, 2), 'there is no head 2'),
        (lambda a: a[2].__setitem__(0, -1), 'there is no head -1'),
        (lambda a: a[0].__setitem__(1, a[0][1][:, :3]), 'of one batch and length'),
        (lambda a: a[0].__setitem__(0, a[0][0][..., :3]), 'weight 0 of LSTM 0 should be'),
        (lambda a: a[1].__setitem__(5, a[1][5][:-1]), 'weight 1 of LSTM 1 should be'),
        (lambda a: a[1].__setitem__(2, a[1][2][1:]), 'weight 2 of LSTM 0 should be'),
        (lambda a: a[1].__setitem__(1, a[1][2]), 'weight_hh should have two dimensions'),
        (lambda a: a[1].__setitem__(0, a[1][0].double()), 'expected tensors of Float on the CPU'),
    ],
)
def test_what_does_not_fit_together_is_refused(change: Any, message: str) -> None:
    given_arguments = arguments()
    change(given_arguments)
    with pytest.raises(RuntimeError, match=message):
        lstm_heads(*given_arguments)


def test_other_types_are_refused() -> None:
    with pytest.raises(RuntimeError, match='takes float32, bfloat16 and float16, got Double'):
        lstm_heads(*arguments(torch.float64))


def test_auto_is_fused_where_that_can_be() -> None:
    module, x = MultiHeadLSTM(16, 2), torch.randn(2, 5, 16)
    pieces = x.chunk(2, -1)
    assert not fits(pieces)  # with gradients
    with torch.no_grad():
        assert choose(module.heads, pieces) == 'fused'
        assert not fits([piece.double() for piece in pieces])
        assert not fits([piece.to('meta') for piece in pieces])
        assert torch.vmap(lambda tokens: torch.tensor(fits(tokens.chunk(2, -1))))(x[None]).tolist() == [False]


def test_gradients_are_those_of_the_plain_form() -> None:
    module, x = MultiHeadLSTM(16, 2), torch.randn(2, 5, 16)
    found = []
    for execution in ('loop', 'fused', 'auto'):
        module.execution = execution
        module.zero_grad()
        module(x).square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_weights_are_read_anew_in_every_call() -> None:
    module, tokens = MultiHeadLSTM(16, 2), torch.randn(2, 5, 16)
    states(module, tokens, 'fused')
    for change in (lambda w: w.data.mul_(0.5), lambda w: setattr(w, 'data', w.data * 2), lambda w: w.add_(0.1)):
        with torch.no_grad():
            for weight in module.heads.parameters():
                change(weight)
        assert torch.allclose(states(module, tokens, 'fused'), states(module, tokens, 'loop'), rtol=0, atol=1e-6)
    others = {name: torch.randn_like(p) * 0.1 for name, p in module.named_parameters()}
    with torch.no_grad():
        module.execution = 'fused'
        found = torch.func.functional_call(module, others, tokens)
        module.load_state_dict(others)
        module.execution = 'loop'
        assert torch.allclose(found, module(tokens), rtol=0, atol=1e-6)


def test_wrapped_lstms_run_one_after_the_other() -> None:
    module, tokens = MultiHeadLSTM(16, 2), torch.randn(2, 5, 16)
    nn.utils.parametrizations.weight_norm(module.heads[0].both, 'weight_hh_l0')
    assert torch.equal(states(module, tokens, 'fused'), states(module, tokens, 'loop'))


@pytest.mark.parametrize('execution', ['auto', 'fused'])
def test_traced_models_hold_no_operator_of_ours(execution: str) -> None:
    module, x = MultiHeadLSTM(16, 2, execution=execution).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = module(x)
        exported = torch.export.export(module, (x,))
        assert 'lstm_heads' not in str(exported.graph)
        assert torch.allclose(exported.module()(x), wanted, atol=1e-6)
        traced = torch.jit.trace(module, x)
        assert 'lstm_heads' not in str(traced.inlined_graph)
        assert torch.allclose(torch.compile(module, backend='eager')(x), wanted, atol=1e-6)


@pytest.mark.parametrize('there', [True, False])
def test_whole_models_with_and_without_the_operator(
    there: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = CASES['ViT']
    model = randomise(case.model()).float()
    replace(model, FAR)
    inputs = {name: value.float() for name, value in case.inputs().items()}
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(**{k: v.double() for k, v in inputs.items()}).logits.float()
        if not there:
            request.getfixturevalue('absent')
        assert torch.allclose(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)
        save_far(model, tmp_path / 'shipped')
        assert torch.allclose(load_far(tmp_path / 'shipped')(**inputs).logits, wanted, rtol=1e-5, atol=1e-5)


def test_describe_says_what_runs() -> None:
    model = vit()
    assert 'auto on cpu: fused without gradients' in ' '.join(str(replace(model, FAR)).split())


@pytest.mark.usefixtures('absent')
def test_describe_says_why_it_is_slower() -> None:
    model = vit()
    text = ' '.join(str(replace(model, FAR)).split())
    assert 'auto on cpu: threads without gradients' in text
    assert 'Slower than fused, its operator is not built: asr-downstream build-ops' in text


def test_tuning_tries_it() -> None:
    model, inputs = vit(), CASES['ViT'].inputs()
    replace(model, FAR)
    with torch.no_grad():
        assert 'fused' in tune(model, lambda: model(**inputs), rounds=1)


@pytest.mark.usefixtures('absent')
def test_tuning_leaves_out_what_is_not_there() -> None:
    model, inputs = vit(), CASES['ViT'].inputs()
    replace(model, FAR)
    with torch.no_grad():
        assert 'fused' not in tune(model, lambda: model(**inputs), rounds=1)
    assert describe(model).rows


@pytest.mark.slow
@pytest.mark.parametrize('vectors', [[], ['-DLSTM_LANES=4', '-DLSTM_ROWS=6'], ['-DLSTM_LANES=16', '-DLSTM_ROWS=6']])
def test_the_loop_stays_in_its_buffers(vectors: list[str], tmp_path: Path) -> None:
    """Under AddressSanitizer, in vectors of several widths, against sums in double precision."""
    if shutil.which('g++') is None:
        pytest.skip('no g++')
    options = ['-std=c++20', '-O1', '-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-march=native']
    folders = ['-I', str(ROOT / 'asr_downstream/far/model/ops'), str(Path(__file__).with_name('lstm_driver.cpp'))]
    made = subprocess.run(
        ['g++', *options, '-Wall', '-Wextra', '-Werror', '-Wno-psabi', *vectors, *folders, '-o', tmp_path / 'driver'],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if 'cannot find' in made.stderr:
        pytest.skip('no sanitizer')
    assert made.returncode == 0, made.stderr
    done = subprocess.run([tmp_path / 'driver'], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_operator_is_loaded_when_it_is_needed() -> None:
    code = (
        'import sys, torch; from asr_downstream.far import MultiHeadLSTM\n'
        'from asr_downstream.far.model.ops.lstm import operator\n'
        'm, x = MultiHeadLSTM(8, 2), torch.randn(1, 3, 8)\n'
        'm(x); print(operator.cache_info().currsize)\n'
        'with torch.no_grad(): m(x); print(operator.cache_info().currsize)\n'
        'print("torch.utils.cpp_extension" in sys.modules)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ['0', '1', 'False'], done.stderr
