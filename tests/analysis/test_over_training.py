"""Gates over a training: what is written, and that the training is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.plugged import ASR, CLASSIC, tiny

from asr_downstream import DataError, plug, record
from asr_downstream.folding.analysis.training import FILE, GateRecorder, read_training

DIA = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))


def trained(spec: Any, recorder: Any = None, steps: int = 6) -> Any:
    """Train a tiny network, and return it with the gates of each step."""
    torch.manual_seed(0)
    model = tiny()
    plug(model, spec)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    watch = None if recorder is None else recorder(model)
    for step in range(1, steps + 1):
        x = torch.randn(4, 3, 16, 16)
        if watch is not None:
            watch.before(step)
        model(x).square().mean().backward()
        if watch is not None:
            watch.after(step)
        optimiser.step()
        optimiser.zero_grad()
    if watch is not None:
        watch.close()
    return model


@pytest.mark.parametrize('spec', [ASR, CLASSIC, DIA], ids=['ASR', 'SE', 'DIA'])
def test_a_training_that_is_watched_is_the_same_to_the_bit(spec: Any, tmp_path: Path) -> None:
    plain = trained(spec)
    watched = trained(spec, lambda model: GateRecorder(model, tmp_path / FILE, 2, images=4))
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = read_training(tmp_path / FILE)
    assert [row['step'] for row in rows] == [1, 2, 4, 6]
    sites = [f'layer{s}.{b}.bn3' for s in (1, 2, 3) for b in (0, 1)]
    assert all(list(row['sites']) == sites for row in rows)
    moves = spec is not ASR
    for row in rows:
        for site in row['sites'].values():
            assert (site['stripe_ratio'] > 0) is moves
            assert site['samples'] == (4 if moves else 1)
    hooks = [m for m in watched.modules() if m._forward_hooks and type(m).__name__ in ('SE', 'Member')]
    assert not hooks


def test_the_gates_are_those_of_the_forwards(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Beside(GateRecorder):
        def before(self, step: int) -> None:
            super().before(step)
            self.own = record(self.model)
            self.kept = self.own.__enter__()

        def after(self, step: int) -> None:
            seen.append({path: torch.cat(gates).double() for path, gates in self.kept.gates.items()})
            self.own.__exit__(None, None, None)
            super().after(step)

    trained(CLASSIC, lambda model: Beside(model, tmp_path / FILE, 3, images=8))
    rows = read_training(tmp_path / FILE)
    assert [row['step'] for row in rows] == [1, 3]  # two steps of four images each; that of step 6 was not finished
    for row, first in zip(rows, (0, 2), strict=True):
        for path, site in row['sites'].items():
            gates = torch.cat([seen[first][path], seen[first + 1][path]])
            assert site['over_samples'] == pytest.approx(float(gates.std(0, unbiased=False).mean()))
            assert site['channel_means'] == pytest.approx(gates.mean(0).tolist(), abs=1e-5)


def test_a_resumed_training_drops_the_lines_of_later_steps(tmp_path: Path) -> None:
    trained(CLASSIC, lambda model: GateRecorder(model, tmp_path / FILE, 2, images=4))
    with (tmp_path / FILE).open('a') as file:
        file.write('{"step": 7, "si')  # a process that was killed
    trained(CLASSIC, lambda model: GateRecorder(model, tmp_path / FILE, 5, images=4, start=3))
    assert [row['step'] for row in read_training(tmp_path / FILE)] == [1, 2, 1, 5]
    (tmp_path / FILE).write_text('{"step": 1, "sites": {}}\nnothing\n{"step": 2, "sites": {}}\n')
    with pytest.raises(DataError, match='line 2 is damaged'):
        read_training(tmp_path / FILE)


def test_a_stock_model_has_nothing_to_write(tmp_path: Path) -> None:
    recorder = GateRecorder(tiny(), tmp_path / FILE, 1)
    recorder.before(1)
    recorder.after(1)
    assert (tmp_path / FILE).read_text() == ''


def test_the_engine_writes_it_and_the_config_says_when(tmp_path: Path) -> None:
    diffusion = pytest.importorskip('helpers.diffusion')
    from asr_downstream.diffusion.training.train import train

    spec = dict(type='Attention', attention=dict(type='SE', reduction=4))
    runs = {}
    for name, steps in (('without', 0), ('with', 2)):
        settings = dict(plug=spec, gate_steps=steps, train_batch_size=64)
        runs[name] = train(diffusion.config_for(tmp_path / name, **settings))
    diffusion.assert_same(runs['without'], runs['with'])
    assert not (runs['without'].parent / FILE).exists()
    rows = [json.loads(line) for line in (runs['with'].parent / FILE).read_text().splitlines()]
    assert [row['step'] for row in rows] == [1, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.det
def test_the_hook_of_detection_writes_it(tmp_path: Path) -> None:
    pytest.importorskip('mmdet')
    from helpers.tiny_detection import pictures, run, tiny, weights

    from asr_downstream.detection.config import stock_config

    digits = pictures(tmp_path)
    path = 'det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py'
    hook = [dict(type='asr_downstream.GatesHook', interval=2, images=4)]
    plain = run(tiny(digits, path=path), tmp_path / 'plain')
    config = tiny(digits, path=path, custom_hooks=hook)
    watched = run(config, tmp_path / 'watched')
    one, other = weights(plain), weights(watched)
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = read_training(tmp_path / 'watched' / FILE)
    assert [row['step'] for row in rows] == [1, 2, 4, 6]
    assert all(site.startswith('backbone.layer') for site in rows[0]['sites'])
    assert 'custom_hooks' not in stock_config(config)
