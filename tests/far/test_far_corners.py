"""FAR where models, processes and numbers are not as expected."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, command
from helpers.far import CASES, FAR, Block, vit, write_config
from torch import Tensor, nn

from asr_downstream import far
from asr_downstream.engine.state import checkpoints
from asr_downstream.errors import AsrError, CheckpointError, PlugError
from asr_downstream.far.config import load_config
from asr_downstream.far.distil.classification import build_classifier
from asr_downstream.far.distil.stages import load_teacher, run_stages
from asr_downstream.far.export import load_far, save_far
from asr_downstream.far.family import prune_family
from asr_downstream.far.model.replace import find_attentions, replace
from asr_downstream.measure.timing import Ratio, faster_from

FORKED = """
import os, signal, threading, torch
from asr_downstream.far import MultiHeadLSTM
torch.set_num_threads(2)
module, x = MultiHeadLSTM(16, 2, execution='threads').eval(), torch.randn(2, 5, 16)
with torch.inference_mode():
    wanted = module(x)
seen = []
other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
other.start(); other.join()
print('threads', torch.get_num_threads(), *seen)
child = os.fork()
if child == 0:
    signal.alarm(60)
    with torch.inference_mode():
        os._exit(0 if torch.allclose(module(x), wanted) else 1)
print('child', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_threads_leave_other_threads_alone_and_survive_a_fork() -> None:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', FORKED], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '2'},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.stdout == 'threads 2 2\nchild 0\n', done.stderr


def test_from_several_threads_at_once() -> None:
    module, x = far.MultiHeadLSTM(16, 2, execution='threads').eval(), torch.randn(2, 5, 16)
    found: list[Tensor] = []

    def work() -> None:
        with torch.inference_mode():
            found.append(module(x))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(out, found[0]) for out in found)


def test_tracing_counting_and_vmap_see_the_lstms() -> None:
    module = far.MultiHeadLSTM(16, 2, execution='threads').eval()
    x, other = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    with torch.no_grad():
        traced = torch.jit.trace(module, x, check_trace=False)
        assert torch.allclose(traced(other), module(other), atol=1e-6)
        module.execution = 'scan'
        mapped = torch.vmap(module)(torch.stack([x, other]))
        assert torch.allclose(mapped[1], module(other), atol=1e-6)


class Reads(nn.Module):
    """Attention that also reads what it is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.proj_drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Nothing of the kind."""
        return self.proj(x)


def test_further_inputs_are_refused_by_name() -> None:
    model = nn.ModuleDict({'attn': Reads()})
    replace(model, {**FAR, 'layers': ['attn']})
    attn, x = model['attn'], torch.randn(2, 5, 16)
    assert attn(x, need_weights=False, mask=None).shape == x.shape
    assert attn(x, attn_mask=torch.ones(5, 5, dtype=torch.bool)).shape == x.shape  # keeps all
    for name, value in {'context': x, 'rope': x, 'position_embeddings': (x, x)}.items():
        with pytest.raises(PlugError, match=f'{name}: a further input'):
            attn(x, **{name: value})
    with pytest.raises(PlugError, match='attn_mask: a mask that hides tokens'):
        attn(x, attn_mask=torch.eye(5, dtype=torch.bool))
    with pytest.raises(PlugError, match='argument 2: a further input'):
        attn(x, x)
    with pytest.raises(PlugError, match='is_causal'):
        attn(x, is_causal=True)


def test_what_an_unknown_attention_has_besides_is_kept_or_refused() -> None:
    model = nn.ModuleDict({'attn': Reads()})
    dropout = model['attn'].proj_drop
    replace(model, {**FAR, 'layers': ['attn']})
    assert model['attn'].proj_drop is dropout
    x = torch.randn(2, 5, 16)
    assert not torch.equal(model.train()['attn'](x), model['attn'](x))
    scaled = Block()
    scaled.attn.norm = nn.LayerNorm(16)
    with pytest.raises(PlugError, match='attn: TimmAttention has norm.weight, norm.bias, which would be lost'):
        replace(nn.Sequential(scaled), {**FAR, 'layers': ['0.attn']})


def test_attentions_of_transformers_by_pattern_return_what_they_should() -> None:
    settings: Any = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = transformers.CLIPVisionModel(settings).eval()
    table = replace(model, {**FAR, 'layers': ['*.self_attn']})
    assert len(table.rows) == 2
    assert model(torch.randn(2, 3, 8, 8)).last_hidden_state.isfinite().all()


def test_decoders_keep_their_cross_attention() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)
    assert [place.path for place in find_attentions(model)] == ['layers.0.self_attn']
    with pytest.raises(PlugError, match='is cross-attention'):
        replace(model, {**FAR, 'layers': ['*.multihead_attn']})


@pytest.mark.parametrize('extra', [{'heads': 4}, {'projection': 'o_proj'}])
@pytest.mark.parametrize('layers', ['all', [0]])
def test_heads_and_projection_go_with_patterns(extra: dict[str, Any], layers: Any) -> None:
    with pytest.raises(PlugError, match='go with patterns'):
        replace(vit(), {**FAR, 'layers': layers, **extra})


def test_heads_of_a_pattern_survive_saving(tmp_path: Path) -> None:
    model = vit()
    replace(model, {**FAR, 'layers': ['vit.layers.*.attention'], 'heads': 4})
    again = load_far(save_far(model, tmp_path / 'far'))
    assert len(again.vit.layers[0].attention.mixer.heads) == 4


def test_a_part_that_was_replaced_is_saved_and_cut_as_that_part(tmp_path: Path) -> None:
    model = vit()
    replace(model.vit, FAR)
    with pytest.raises(PlugError, match='was replaced in a part of it'):
        save_far(model, tmp_path / 'far')
    with pytest.raises(PlugError, match='was replaced in a part of it'):
        far.cut(model, far.Budget('units', 0.5))
    far.cut(model.vit, far.Budget('units', 0.5))
    with pytest.raises(PlugError, match='no attention is replaced'):
        far.cut(vit(), far.Budget('units', 0.5))


def test_precision_survives_saving(tmp_path: Path) -> None:
    model = vit().to(torch.bfloat16)
    replace(model, FAR)
    again = load_far(save_far(model, tmp_path / 'far'))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_relative_thresholds_keep_a_unit_of_each_direction() -> None:
    model = vit()
    replace(model, FAR)
    with pytest.raises(AsrError, match='at most 1'):
        far.cut(model, far.Budget('threshold', 1.1))
    with pytest.raises(AsrError, match=r'the least is 0\.125'):  # 8 of 64 units
        far.cut(model, far.Budget('units', 0.05))
    far.cut(model, far.Budget('units', 0.125))
    assert {pair for row in far.describe(model).rows for pair in row.widths} == {(1, 1)}


def test_timing_leaves_the_mode() -> None:
    from asr_downstream.far.prune.budgets import time_ratio

    model = vit().train()
    assert 0.1 < time_ratio(model, vit(), CASES['ViT'].inputs()) < 10
    assert model.training


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'stages': [dict(name='../escaped')]}, 'a name of its own'),
        ({'stages': [dict(name='FAR-50')]}, 'not beginning with'),
        ({'stages': [dict(name='a', holdout=0.5)]}, 'a: holdout holds for all stages'),
        ({'prune': dict(spars=dict(hoyer=1.0))}, 'sparse=dict'),
        ({'prune': dict(sparse=dict(data=dict(type='Digits', resolution=8)))}, 'sparse: data holds for all stages'),
    ],
)
def test_stages_share_data_and_have_names_that_are_folders(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AsrError, match=message):
        load_config(write_config(tmp_path, **settings))


def test_teachers_of_another_class_or_without_normalisation_are_refused(tmp_path: Path) -> None:
    vit('ViT').save_pretrained(tmp_path / 'vit')
    wrong = dict(type='DeiTForImageClassification', pretrained_model_name_or_path=str(tmp_path / 'vit'))
    with pytest.raises(AsrError, match='is it a DeiTForImageClassification'):
        build_classifier(wrong, 0)
    right = {**wrong, 'type': 'ViTForImageClassification'}
    stages = [dict(name='distill')]
    with pytest.raises(AsrError, match='say how its images are normalised'):
        load_teacher(load_config(write_config(tmp_path, teacher=right, stages=stages)), tmp_path / 'out')
    stored = {'image_processor_type': 'ViTImageProcessor', 'image_mean': [0.25], 'image_std': [0.5]}
    (tmp_path / 'vit' / 'preprocessor_config.json').write_text(json.dumps(stored))
    config = load_config(write_config(tmp_path, teacher=right, stages=stages))
    from asr_downstream.far.distil.classification import Classification

    task = Classification(config)
    assert task.inputs({'image': torch.zeros(1, 1, 8, 8)})['pixel_values'].unique().item() == pytest.approx(0.5)
    more = {**right, 'num_labels': 20, 'ignore_mismatched_sizes': True}
    with pytest.raises(AsrError, match='num_labels=20, but the data has 10 classes'):
        load_teacher(load_config(write_config(tmp_path, teacher=more, stages=stages)), tmp_path / 'out')


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('corners')
    stages = [dict(name='teacher', learns='teacher'), dict(name='distill')]
    config = load_config(write_config(folder, stages=stages, max_train_steps=2, validation_steps=0))
    run_stages(config, folder / 'out')
    return folder


def test_the_student_is_not_written_over_by_a_member_of_its_name(run: Path) -> None:
    with pytest.raises(AsrError, match='FAR-100 is the student before pruning, which would be lost'):
        prune_family(load_config(run / 'tiny.py'), run / 'out', [far.Budget('units', 1.0), far.Budget('units', 0.5)])


def test_what_is_timed_over_tokens_is_what_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asr_downstream.far.evaluation import evaluate
    from asr_downstream.far.model.describe import mixers

    teacher, student = vit().eval(), vit().eval()
    far.replace(student, dict(type='FAR', layers=[1]))
    seen: dict[str, Any] = {}
    monkeypatch.setattr(evaluate, 'on_tokens', lambda module, x: seen.update({str(len(seen)): module}))
    monkeypatch.setattr(evaluate, 'paired_times', lambda calls, *a, **k: dict.fromkeys(calls, [1.0]))
    evaluate.sweep({'teacher': teacher, 'FAR-100': student}, tokens=(4,), batches=(1,), rounds=1)
    assert [bool(list(mixers(module))) for module in seen.values()] == [False, True]


def test_an_unfinished_student_is_not_pruned(run: Path) -> None:
    config = load_config(run / 'tiny.py', {'max_train_steps': 3})
    with pytest.raises(AsrError, match='its stages are not finished'):
        prune_family(config, run / 'out', [far.Budget('units', 0.5)])
    config = load_config(run / 'tiny.py')
    with pytest.raises(AsrError, match='can be given once'):
        prune_family(config, run / 'out', [far.Budget('units', 0.5)] * 2)
    assert not (run / 'out' / 'sparse').exists()


def test_a_finished_stage_of_another_recipe_is_not_passed_over(run: Path) -> None:
    config = load_config(run / 'tiny.py', {'hoyer': 0.5})
    with pytest.raises(CheckpointError, match=r'was trained with hoyer=0\.0'):
        run_stages(config, run / 'out', resume=True)


def test_a_cut_by_latency_is_made_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asr_downstream.far.prune import budgets

    out = tmp_path / 'out'
    shutil.copytree(run / 'out', out)
    config = load_config(run / 'tiny.py')
    budget = far.Budget('latency', 0.5)
    units = lambda model: sum(row.units for row in far.describe(model).rows)  # noqa: E731
    monkeypatch.setattr(budgets, 'time_ratio', lambda model, whole, example: units(model) / 100)
    prune_family(config, out, [budget])
    first = load_far(out / 'shipped' / budget.name)
    assert units(first) == 50
    shutil.rmtree(checkpoints.find(out / budget.name))
    (out / budget.name / 'log.jsonl').unlink()
    monkeypatch.setattr(budgets, 'time_ratio', lambda model, whole, example: units(model) / 50)
    prune_family(config, out, [budget], resume=True)
    assert units(load_far(out / 'shipped' / budget.name)) == 50
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(AsrError, match='measured on one process|were launched'):
        prune_family(config, out, [budget], resume=True)


def test_numbers_of_parameters_name_members_apart() -> None:
    names = [far.Budget('parameters', n).name for n in (1234567, 1234571, 5000000, 0.9)]
    assert names == [
        'FAR-parameters-1234567', 'FAR-parameters-1234571', 'FAR-parameters-5000000', 'FAR-parameters-90'
    ]  # fmt: skip


def test_faster_from_is_where_all_longer_ones_are_faster() -> None:
    slow, fast, mixed = Ratio(1.5, 1.4, 1.6), Ratio(0.5, 0.4, 0.6), Ratio(0.95, 0.8, 1.1)
    assert faster_from({64: fast, 128: slow, 256: fast, 512: fast}) == 256
    assert faster_from({64: fast, 128: fast, 256: mixed}) is None
    assert faster_from({64: fast}) == 64


def test_attention_over_tokens_is_swept(run: Path) -> None:
    from asr_downstream.far.evaluation.evaluate import load_family, sweep, sweep_table
    from asr_downstream.far.family import ship_trained

    ship_trained(load_config(run / 'tiny.py'), run / 'out')
    (run / 'out' / 'shipped' / '.FAR-50.tmp').mkdir(exist_ok=True)
    shutil.copy(run / 'out' / 'shipped' / 'FAR-100' / 'far.json', run / 'out' / 'shipped' / '.FAR-50.tmp')
    models = load_family(run / 'out')
    assert list(models) == ['teacher', 'FAR-100']
    rows = sweep(models, tokens=(4, 8), batches=(1, 2), rounds=2)
    assert [(row['batch'], row['tokens']) for row in rows] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert 'batch 2, FAR-100: ' in sweep_table(rows)


def test_commands_say_what_is_missing(tmp_path: Path) -> None:
    done = command('evaluate_far', tmp_path)
    assert done.returncode == 1
    assert 'run tools/distill_far.py first' in done.stderr
