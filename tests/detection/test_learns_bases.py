"""Detectors in which only a part learns: frozen stages, heads of other classes, bases that fit or do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.learning_detection import FLIPS, STATISTICS, AtStart, is_norm, plugged
from helpers.tiny_detection import (
    Dead,
    DieAt,
    assert_same,
    run,
    tiny,
    weights,
)

from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.detection.training.learning import META, learning_of
from asr_downstream.errors import CheckpointError, PlugError
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.folding.adapters.base import BASE_FILE, read_base
from asr_downstream.modules.slots import GATES
from asr_downstream.plugging.describe import describe


def test_gates_in_frozen_stages_learn_and_the_stages_do_not(digits: Path, stock: Path, tmp_path: Path) -> None:
    options = {'model.backbone.frozen_stages': 1, 'model.backbone.norm_eval': True}
    config = plugged(digits, stock, learns='gates', **options)
    start = AtStart()
    after = weights(run(config, tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    inside = {name for name in changed if name.startswith('backbone.layer1.')}
    assert {name.rpartition('.gate.')[0] for name in inside} == {'backbone.layer1.0.bn2', 'backbone.layer1.1.bn2'}
    assert changed == {name for name, _ in start.model.named_parameters() if GATES.search(name)}
    with pytest.warns(UserWarning, match='2 sites lie in frozen blocks'):  # where all learn, these never would
        assert len(describe(build_detector(plugged(digits, stock, **options))).sites) == 4


def test_norms_of_frozen_stages_stay_frozen_unless_a_pattern_names_them(
    digits: Path, stock: Path, tmp_path: Path
) -> None:
    config = plugged(digits, stock, learns=['norms', 'backbone.layer1.0.bn1.*'], **{'model.backbone.frozen_stages': 1})
    start = AtStart()
    after = weights(run(config, tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    first = {name for name in changed if name.startswith(('backbone.layer1.', 'backbone.bn1'))}
    assert first == {'backbone.layer1.0.bn1.weight', 'backbone.layer1.0.bn1.bias'}  # statistics: mmdet's own eval mode
    assert 'backbone.layer2.0.bn1.weight' in changed


@pytest.mark.slow
def test_the_head_of_other_classes_learns_by_itself_and_goes_on(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(**options: Any) -> Any:
        base = digits.parent / 'few.pth'
        return plugged(digits, base, learns='gates', **FLIPS, **options)

    few = randomise(build_detector(tiny(digits, **{'model.bbox_head.num_classes': 3})))
    torch.save({'state_dict': few.state_dict()}, digits.parent / 'few.pth')
    head = {'bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'}
    start = AtStart()
    whole = run(config(), tmp_path / 'whole', hooks=(start,))
    changed = {name for name, value in weights(whole).items() if not torch.equal(value, start.state[name])}
    assert {name for name in changed if not GATES.search(name)} == head
    said = capsys.readouterr().out
    assert 'size mismatch for bbox_head.retina_cls.weight' in said
    assert 'missing keys' not in said  # the gates
    assert set(read_checkpoint(whole)['meta'][META]['new']) == head
    assert set(read_base(tmp_path / 'whole' / BASE_FILE).heads) == head
    with pytest.raises(Dead):
        run(config(), tmp_path / 'parts', hooks=(DieAt(4),))
    assert_same(run(config(), tmp_path / 'parts', 'auto'), whole)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.update(more=torch.zeros(1)), r'another model than the config builds \(RetinaNet\): it has more,'),
        (lambda s: s.update({'backbone.layer1.0.bn2.gate.0.odd': torch.zeros(1)}), 'has gates that RetinaNet has not'),
        (lambda s: s.update({'backbone.layer1.0.bn2.gate.0.psi': torch.zeros(1, 4)}), 'its gates are others'),
        (lambda s: [s.pop(k) for k in list(s)] and s.update(a=torch.zeros(1)), 'another model .* it has a, and lacks'),
    ],
)
def test_a_base_of_another_model_is_refused(
    digits: Path, stock: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    state = weights(stock)
    change(state)
    torch.save({'state_dict': state}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=rf'other\.pth: .*{message}'):
        run(plugged(digits, tmp_path / 'other.pth', learns='gates'), tmp_path / 'run')


def test_a_part_that_the_base_has_not_learns_and_another_head_is_named(
    digits: Path, stock: Path, tmp_path: Path
) -> None:
    state = weights(stock)
    del state['neck.fpn_convs.0.conv.bias']
    torch.save({'state_dict': state}, tmp_path / 'less.pth')
    config = plugged(digits, tmp_path / 'less.pth', learns='gates')
    assert learning_of(config, build_detector(config)).new == ('neck.fpn_convs.0.conv.bias',)
    state['bbox_head.fc.weight'] = torch.zeros(1)
    torch.save({'state_dict': state}, tmp_path / 'head.pth')
    config = plugged(digits, tmp_path / 'head.pth', learns=['gates', 'bbox_head.*'])
    assert 'bbox_head.retina_cls.weight' in learning_of(config, build_detector(config)).names
    config.learns = 'gates'
    with pytest.raises(CheckpointError, match=r'it has bbox_head.fc.weight'):
        learning_of(config, build_detector(config))


@pytest.mark.slow
def test_a_plugged_checkpoint_is_a_base_as_well(digits: Path, stock: Path, tmp_path: Path) -> None:
    first = run(plugged(digits, stock, learns='gates'), tmp_path / 'first')
    start = AtStart()
    run(plugged(digits, first, learns='gates'), tmp_path / 'second', hooks=(start,))
    assert all(torch.equal(start.state[name], value) for name, value in weights(first).items())


def test_without_a_base_it_is_said(digits: Path) -> None:
    config = plugged(digits, None, learns='gates')
    with pytest.warns(UserWarning, match=r"learns='gates', and no load_from: what is frozen stays as it is drawn"):
        learning_of(config, build_detector(config))


def test_a_start_that_is_not_the_base_is_said(digits: Path, stock: Path) -> None:
    config = plugged(digits, stock, learns='gates', **{'model.backbone.plug.preserve': False})
    with pytest.warns(UserWarning, match='do not start at 1'):
        learning_of(config, build_detector(config))


def test_gates_of_a_stock_model_are_refused(digits: Path, stock: Path, tmp_path: Path) -> None:
    with pytest.raises(PlugError, match='RetinaNet has no gates, it is a stock model'):
        run(tiny(digits, learns='gates', load_from=str(stock)), tmp_path)
    config = tiny(digits, learns='bbox_haed.*', load_from=str(stock))
    with pytest.raises(PlugError, match=r"'bbox_haed.\*' matches no weight of RetinaNet; the nearest are bbox_head"):
        run(config, tmp_path)


def test_a_stock_detector_trains_its_norms(digits: Path, stock: Path, tmp_path: Path) -> None:
    start = AtStart()
    after = weights(run(tiny(digits, learns='norms', load_from=str(stock)), tmp_path, hooks=(start,)))
    changed = {name for name, value in after.items() if not torch.equal(value, start.state[name])}
    assert {name for name in changed if not name.endswith(STATISTICS)} == set(filter(is_norm, start.state))
