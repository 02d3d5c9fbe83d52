"""Distances between logits, and several distances in one stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.far import CASES, FAR, vit, write_config

from asr_downstream.errors import AsrError, PlugError
from asr_downstream.far.config import load_config, stage_config
from asr_downstream.far.distil.classification import Classification
from asr_downstream.far.distil.loss import DISTANCES, Distances, Features
from asr_downstream.far.distil.stages import run_stages
from asr_downstream.far.distil.task import Distillation
from asr_downstream.far.model.replace import find_attentions, replace
from asr_downstream.registry import build

KL: dict[str, Any] = dict(type='KL', temperature=3.0, weight=0.7)
HEADS: dict[str, Any] = dict(type='MSE', feature='heads', weight=2.0)


def logits_of(output: Any) -> torch.Tensor:
    return output.logits


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_kl_is_that_of_the_softened_classes(temperature: float) -> None:
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    wanted = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (t, s))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        wanted += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 4
    distance = build(DISTANCES, dict(type='KL', temperature=temperature))
    assert float(distance(student, teacher)) == pytest.approx(wanted, abs=1e-12)
    assert float(distance(teacher, teacher)) == pytest.approx(0, abs=1e-15)
    assert float(distance(teacher, student)) != pytest.approx(wanted, rel=1e-3)  # it has a direction


def test_the_gradient_of_kl_keeps_its_size_at_any_temperature() -> None:
    """Divided by T twice and multiplied by T squared, it tends to that of the squared error of the logits."""
    grads = []
    for temperature in (100.0, 1000.0):
        logits = torch.tensor([[1.0, -1.0]], dtype=torch.float64, requires_grad=True)
        distance = build(DISTANCES, dict(type='KL', temperature=temperature))
        (grad,) = torch.autograd.grad(distance(logits, torch.zeros(1, 2, dtype=torch.float64)), logits)
        grads.append(grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-3)
    assert torch.allclose(grads[1], torch.tensor([[0.5, -0.5]], dtype=torch.float64), rtol=1e-3)


def test_several_distances_are_measured_in_one_forward_and_weighed() -> None:
    case = CASES['ViT']
    teacher, student = case.model(), case.model()
    places = find_attentions(teacher)
    replace(student, FAR)
    inputs = {key: value.double() for key, value in case.inputs().items()}
    calls = []
    specs = [HEADS, dict(type='Cosine', feature='block'), KL]

    def run(model: Any) -> Any:
        return lambda: calls.append(model) or model(**inputs)

    several = Distances(specs, logits=logits_of)
    output, total, parts = several.measure(teacher, run(teacher), student, run(student), places)
    assert calls == [teacher, student]
    wanted = 0.0
    for spec, name in zip(specs, ('MSE-heads', 'Cosine-block', 'KL-logits'), strict=True):
        alone = Distances([spec], logits=logits_of)
        _, value, own = alone.measure(teacher, run(teacher), student, run(student), places)
        assert float(parts[f'distance/{name}']) == pytest.approx(float(own['distance']), abs=1e-12)
        assert float(value) == pytest.approx(spec.get('weight', 1.0) * float(own['distance']), abs=1e-12)
        assert float(value) > 1e-4
        paths = [key for key in parts if key.startswith(f'distance/{name}/')]
        assert len(paths) == (0 if name == 'KL-logits' else 2)
        wanted += float(value)
    assert float(total) == pytest.approx(wanted, abs=1e-12)
    with torch.no_grad():
        divergence = build(DISTANCES, dict(type='KL', temperature=3.0))(output.logits, teacher(**inputs).logits)
    assert float(parts['distance/KL-logits']) == pytest.approx(float(divergence), abs=1e-12)
    with Features(teacher, places, 'heads') as a, Features(student, places, 'heads') as b, torch.no_grad():
        teacher(**inputs), student(**inputs)
    errors = sum(float((a.found[p.path] - b.found[p.path]).square().mean()) for p in places)
    assert float(parts['distance/MSE-heads']) == pytest.approx(errors, abs=1e-12)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        (dict(type='KL', feature='heads'), "KL is of logits; compare 'heads' by MSE or Cosine"),
        (dict(type='KL', temperature=0.0), r'temperature=0\.0 should be greater than 0'),
        (dict(type='KL', temperature='2'), 'should be a number'),
        (dict(type='MSE', temperature=2.0), "takes no 'temperature'"),
        ([], 'should be one or more'),
        ([KL, dict(type='KL')], 'each with another type or feature'),
    ],
)
def test_distances_that_make_no_sense(spec: Any, message: str) -> None:
    with pytest.raises(PlugError, match=message):
        Distances(spec, logits=logits_of)


def test_logits_are_refused_where_there_are_none() -> None:
    with pytest.raises(PlugError, match="feature='logits' needs a task with logits, such as Classification"):
        Distances([HEADS, KL])
    Distances([HEADS, dict(type='Cosine', feature='block')])


def test_a_stage_learns_features_and_logits(tmp_path: Path) -> None:
    stages = [dict(name='distill', distance=[HEADS, KL], task_weight=0.5, learning_rate=1e-2)]
    config = load_config(write_config(tmp_path, stages=stages, max_train_steps=3, validation_steps=0))
    run_stages(config, tmp_path / 'out')
    from asr_downstream.engine.trackers import read_log

    rows = read_log(tmp_path / 'out' / 'distill' / 'log.jsonl', having='loss')
    for row in rows:
        wanted = 0.5 * row['task'] + 2.0 * row['distance/MSE-heads'] + 0.7 * row['distance/KL-logits']
        assert row['loss'] == pytest.approx(wanted, rel=1e-5)
    run_stages(config, tmp_path / 'out', resume=True)  # finished before: the list is the same in the checkpoint
    other = load_config(tmp_path / 'tiny.py', {'stages.0.distance.1.temperature': 4.0})
    with pytest.raises(AsrError, match='was trained with distance='):
        run_stages(other, tmp_path / 'out', resume=True)


def test_logits_alone_need_no_hooks(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))
    for distance, fits in ((KL, True), ([HEADS, KL], False)):
        stage = stage_config(config, 'distill', distance=distance, gradient_checkpointing=True)
        student = vit()
        replace(student, FAR)
        if fits:
            assert Distillation(Classification(stage, student), vit(), stage).distances is not None
        else:
            with pytest.raises(AsrError, match='gradient_checkpointing hides'):
                Distillation(Classification(stage, student), vit(), stage)
