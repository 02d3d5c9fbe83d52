"""`ablate`: its arms, what it reads from stored runs, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from PIL import Image

from asr_downstream import describe, fold, plug
from asr_downstream.commands import ablate
from asr_downstream.commands.ablation.arms import ARMS, arm_of, chosen, folding_of
from asr_downstream.commands.ablation.kinds.detection import read_lines
from asr_downstream.commands.ablation.records import Record, arms_of_names, by_arm, check_alike
from asr_downstream.commands.ablation.results import HEADS, result_of
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.commands.ablation.study import read_stored
from asr_downstream.errors import AsrError, DataError
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet
from asr_downstream.registry import PLUGS

STORED = ROOT / 'det_configs/results/bccd.jsonl'
PLUGS.import_from_location()
PLUGGED = [name for name, arm in ARMS.items() if arm.plug and arm.plug['type'] != 'Start']

# Arms -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', PLUGGED)
def test_arms_are_plugs(name: str) -> None:
    model = ResNet(BasicBlock, 1, 10)
    plug(model, ARMS[name].plug)
    sites = describe(model).sites
    assert len(sites) == 3
    assert all(site.folds for site in sites) == (folding_of(ARMS[name].plug) == 'exact')
    assert arm_of(ARMS[name].plug) == name


def test_plugs_that_are_no_arms_have_names() -> None:
    asr = dict(type='ASR', attention=dict(type='SE', reduction=4), repeat=2)
    assert arm_of(asr) == 'ASR(SE, reduction=4, repeat=2)'
    assert arm_of([dict(type='Start', value=0.25), ARMS['se'].plug]) == 'Start(value=0.25) + SE(reduction=16)'
    assert arm_of(None) == 'stock'


def test_a_norm_affine_starts_from_the_model_and_has_the_numbers_of_a_norm() -> None:
    model = ResNet(BasicBlock, 1, 10)
    before = sum(p.numel() for p in model.parameters())
    channels = 16 + 32 + 64
    plug(model, ARMS['norm-affine'].plug)
    assert sum(p.numel() for p in model.parameters()) - before == 2 * channels
    folded = fold(model.eval())[0].state_dict()
    assert all((value == folded[key]).all() for key, value in model.state_dict().items() if key in folded)


def test_the_help_names_the_arms() -> None:
    assert ','.join(ARMS) == ablate.ALL


def test_arms_are_chosen_by_name_or_file(tmp_path: Path) -> None:
    file = tmp_path / 'mine.py'
    file.write_text("plug = [dict(type='ASR', attention=dict(type='SE', reduction=4), repeat=2)]\n")
    found = chosen(f'stock, asr-se,twice={file}')
    assert list(found) == ['stock', 'asr-se', 'twice']
    assert found['twice'].plug == [dict(type='ASR', attention=dict(type='SE', reduction=4), repeat=2)]
    assert folding_of(found['twice'].plug) == 'exact'
    assert folding_of([*found['twice'].plug, ARMS['se'].plug]) == 'calibrated'
    assert folding_of(None) is None
    with pytest.raises(AsrError, match=r"'asr-es' is no arm; did you mean 'asr-se'\?"):
        chosen('stock,asr-es')
    with pytest.raises(AsrError, match="'se' stands twice"):
        chosen('se,stock,se')
    with pytest.raises(AsrError, match='cannot be the name of an arm'):
        chosen(f'../up={file}')
    file.write_text('model = dict()\n')
    with pytest.raises(AsrError, match='has no plug'):
        chosen(f'mine={file}')
    file.write_text("plug = dict(type='ASR', attention=dict(type='SEE'))\n")
    with pytest.raises(AsrError, match="'SEE'"):
        chosen(f'mine={file}')


def test_a_start_has_nothing_to_fold() -> None:
    assert folding_of(ARMS['start'].plug) is None
    assert chosen('start')['start'].plug == dict(type='Start', value=0.5)


# Stored runs ----------------------------------------------------------------------------------------------------------


def test_the_blood_cell_table_comes_from_its_stored_runs(tmp_path: Path) -> None:
    done = command('ablate', '--runs', STORED, '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('undecided (p = ') == 5
    assert 'ASR(SE) - stock: -0.013 AP, 95% interval [-0.022, -0.005]: undecided (p = 0.022, but 0.11' in done.stdout
    kept = (ROOT / 'docs/results.md').read_text()
    written = (tmp_path / 'ablation.md').read_text()
    assert written in (ROOT / 'docs/ablation.md').read_text(), 'put the table into docs/ablation.md'
    content = json.loads((tmp_path / 'ablation.json').read_text())
    rows = {line.split('|')[1].strip(): [cell.strip() for cell in line.split('|')[2:-1]] for line in kept.splitlines()
            if line.startswith('| `retinanet_r18-w32')}  # fmt: skip
    assert len(content['arms']) == len(rows) == 6
    for arm, cells in zip(content['arms'], rows.values(), strict=True):
        [line] = [line for line in written.splitlines() if line.startswith(f'| {arm["label"]} |')]
        found = dict(zip(HEADS, (cell.strip() for cell in line.split('|')[1:-1]), strict=True))
        assert (found['seeds'], found['trained'], found['difference']) == (cells[0], cells[1], cells[3])
        assert found['folded'].partition(' (')[0] == cells[4]
        assert ('calibrated' in found['folded']) == (cells[5] == 'yes')
        assert found['parameters'] == ' -> '.join(filter(None, cells[6:8]))
    assert content['kind'] == 'detection'
    about = {'name': 'AP', 'key': 'AP', 'scale': 1.0, 'higher_is_better': True, 'rounded_to': 0.001}
    assert content['metric'] == about
    [comparison] = [c for c in content['comparisons'] if c['arm'] == 'asr-se']
    assert comparison['differences'] == pytest.approx([-0.010, -0.017, -0.013])
    assert comparison['interval'] == pytest.approx([-0.0221, -0.0046], abs=1e-4)
    assert comparison['outcome'] == 'undecided'
    assert len(content['runs']) == 18
    assert content['runs'][0]['sha256'].startswith('10149c417a6f')
    assert content['command'][:3] == ['ablate', '--runs', str(STORED)]
    with Image.open(tmp_path / 'ablation.png') as image:
        assert image.size[0] > 800
    assert '<svg' in (tmp_path / 'ablation.svg').read_text()


def test_the_table_prints_everything_at_once() -> None:
    result = result_of('detection', 'AP50', Metric('AP50', step=1e-3), read_lines(STORED), 'layerscale')
    text = str(result)
    assert 'ASR(SE) - LayerScale: -0.017 AP50' in text
    assert result._repr_html_().count('<tr>') == 7
    assert next(iter(result.values)) == 'layerscale', 'what the others are compared with comes first'


def test_another_metric_or_reference(tmp_path: Path) -> None:
    done = command('ablate', '--runs', STORED, '--out', tmp_path, '--metric', 'AP5')
    assert done.returncode == 1
    assert "--metric: 'AP5' is none of detection; there is AP, AP50" in done.stderr
    done = command('ablate', '--runs', STORED, '--out', tmp_path, '--reference', 'asr')
    assert done.returncode == 1
    assert "no complete run of 'asr'; did you mean 'asr-" in done.stderr


def test_arms_in_names_of_configs() -> None:
    assert arms_of_names(['r18-w32_fpn_x', 'r18-w32-se_fpn_x', 'r18-w32-asr-se_fpn_x', 'other_fpn_x']) == {
        'r18-w32_fpn_x': 'stock',
        'r18-w32-se_fpn_x': 'se',
        'r18-w32-asr-se_fpn_x': 'asr-se',
        'other_fpn_x': 'other_fpn_x',
    }
    assert arms_of_names(['unet-asr-dia']) == {'unet-asr-dia': 'asr-dia'}
    assert arms_of_names(['semantic-se2_x']) == {'semantic-se2_x': 'stock'}
    bare = ['stock', 'se', 'asr-se', 'asr-dia']  # configs of an ablation
    assert arms_of_names(bare) == dict(zip(bare, bare, strict=True))
    mixed = {'asr-se': 'asr-se', 'r18': 'stock', 'r18-asr-dia': 'asr-dia', 'r50-asr-dia': 'r50-asr-dia'}
    assert arms_of_names(mixed) == mixed


def test_runs_that_differ_in_more_than_the_arm_are_refused() -> None:
    with pytest.raises(DataError, match=r'4e-ft_fpn_bccd, seed 0: epochs is 4, but 12 in retinanet_pvtv2'):
        result_of('detection', 'AP', Metric('AP'), read_lines(ROOT / 'det_configs/results/bccd-far.jsonl'))
    one = Record('stock', 0, {'AP': 0.5}, setting={'epochs': 1})
    check_alike([one, Record('a', 0, {'AP': 0.5}, setting={'batch': 2})])  # what one does not know is no difference
    with pytest.raises(DataError, match='stock, seed 0: is there twice'):
        by_arm([one, one], 'AP')
    with pytest.raises(DataError, match='AP is not finite'):
        by_arm([Record('a', 0, {'AP': float('nan')})], 'AP')
    with pytest.raises(DataError, match='AP75 is missing; there is AP'):
        by_arm([one], 'AP75')
    with pytest.raises(AsrError, match='nothing to compare'):
        result_of('detection', 'AP', Metric('AP'), [])


def rows(**changes: Any) -> list[dict[str, Any]]:
    return [{**json.loads(line), **changes} for line in STORED.read_text().splitlines()]


def lines(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text(''.join(json.dumps(row) + '\n' for row in found))
    return path


def test_arms_are_told_by_the_names_of_all_files(tmp_path: Path) -> None:
    """Alone, the second file is a base of its own, and its arm would be taken for one of the first."""
    ours = lines(tmp_path / 'a.jsonl', rows()[:3])
    others = lines(tmp_path / 'b.jsonl', [{**row, 'config': 'faster-rcnn_r50-asr-dia_fpn_voc'} for row in rows()[:3]])
    _, records = read_stored([ours, others])
    assert {record.arm for record in records} == {'stock', 'faster-rcnn_r50-asr-dia_fpn_voc'}


def test_detectors_that_were_tested_on_other_data_are_refused(tmp_path: Path) -> None:
    found = [{**row, 'data': ['bccd/val.json' if number < 3 else 'voc/val.json']} for number, row in enumerate(rows())]
    with pytest.raises(DataError, match=r"data is \['voc/val.json'\], but \['bccd/val.json'\] in"):
        result_of('detection', 'AP', Metric('AP'), read_lines(lines(tmp_path / 'a.jsonl', found)))


def test_what_coco_does_not_define_is_no_number(tmp_path: Path) -> None:
    found = [{**row, 'trained': {**row['trained'], 'APs': -1.0}} for row in rows()]
    records = read_lines(lines(tmp_path / 'a.jsonl', found))
    with pytest.raises(DataError, match='APs is missing; there is AP,'):
        by_arm(records, 'APs')


def test_files_without_runs_or_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'a.jsonl: is empty'):
        read_lines(lines(tmp_path / 'a.jsonl', []))
    with pytest.raises(DataError, match='line 1 is no record'):
        read_lines(lines(tmp_path / 'a.jsonl', rows(seed=None)))


@pytest.mark.parametrize('line', ['{"config": 1}', '[', '{"config": "a", "seed": "0", "trained": {}}', '[' * 9999])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / 'results.jsonl'
    path.write_text(STORED.read_text().splitlines()[0] + f'\n{line}\n')
    with pytest.raises(DataError, match='line 2 is no record of results-det'):
        read_lines(path)


def test_names_of_arms_are_text_everywhere(tmp_path: Path) -> None:
    """Names of configs come from files: no markup, no formula, no table."""
    rows = [json.loads(line) for line in STORED.read_text().splitlines()]
    hostile = '[red]$x_1$|<b>&'
    for row in rows[3:6]:
        row['config'] = hostile
    path = tmp_path / 'results.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    done = command('ablate', '--runs', path, '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert f'{hostile} - stock: -0.010 AP' in done.stdout
    assert '[red]$x_1$\\|<b>& | 0, 1, 2 |' in (tmp_path / 'out/ablation.md').read_text()
    assert '[red]$x_1$|&lt;b&gt;&amp;' in (tmp_path / 'out/ablation.svg').read_text()


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        ([], 'give CONFIG to train, or --runs'),
        (['CONFIG', '--runs', 'x'], 'give CONFIG to train, or --runs'),
        (['CONFIG', '--seeds', '0'], 'at least one seed'),
        (['CONFIG', '--seeds', '1,1'], "'1,1' should be how many, such as 5, or which"),
        (['CONFIG', '--jobs', '0'], 'at least 1'),
    ],
)
def test_wrong_command_lines(words: list[str], said: str) -> None:
    done = command('ablate', *words)
    assert done.returncode == 2
    assert said in ' '.join(done.stderr.split())


def test_seeds() -> None:
    assert ablate.seeds('3') == [0, 1, 2]
    assert ablate.seeds('3,') == [3]
    assert ablate.seeds('7,0') == [7, 0]
