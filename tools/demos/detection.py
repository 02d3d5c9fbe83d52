"""The last part of the demo: three detectors of one seed, stock, ASR(SE) and DIA, trained on digits, folded, compared.

ASR folds exactly, and is evaluated in a process that refuses this package; DIA folds by calibration.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from rich.table import Table
from safetensors.torch import load_file

from asr_downstream.console.text import render
from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.coco import read_annotations
from asr_downstream.detection.data.digits import CLASSES, make_digits
from asr_downstream.detection.evaluation import compare as comparing
from asr_downstream.detection.evaluation import evaluate as evaluation
from asr_downstream.detection.evaluation.calibrate import CalibrationPlan
from asr_downstream.detection.evaluation.evaluate import Detections, Evaluation
from asr_downstream.detection.evaluation.pictures import draw_detections
from asr_downstream.detection.export import fold_checkpoint
from asr_downstream.detection.models.detectors import load_detector
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import write_json
from asr_downstream.measure.versions import versions
from asr_downstream.plugging.describe import describe

__all__ = ['run_demo']

ARMS = {
    'stock': 'retinanet_r18-w16_fpn_digits.py',
    'ASR(SE)': 'retinanet_r18-w16-asr-se_fpn_digits.py',
    'DIA': 'retinanet_r18-w16-dia_fpn_digits.py',
}
FOLDED = 'ASR(SE), folded'
MEANS = 'DIA, calibrated'
CALIBRATION = CalibrationPlan(images=64, evaluate=False)
PICTURES = 5


class EpochLine(Hook):
    """Print one line an epoch: number, loss, time left. To the real stdout: that of the libraries is silenced."""

    def before_train(self, runner: Runner) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def after_train_epoch(self, runner: Runner) -> None:
        """Print the line."""
        done, total = runner.epoch + 1, runner.max_epochs
        loss = runner.message_hub.get_scalar('train/loss').mean(len(runner.train_dataloader))
        left = (time.perf_counter() - self.start) / done * (total - done)
        print(f'  epoch {done:2d}/{total}  loss {loss:.3f}  {left:3.0f} s left', file=sys.__stdout__, flush=True)


def run_demo(out: Path, configs: Path, tools: Path, epochs: int | None = None) -> dict[str, Any]:
    """Run everything and write ``out/summary.json`` and ``out/detections.png``.

    Args:
        out: folder to write.
        configs: folder of the digits configs.
        tools: folder of the command line tools, for the process that may not import this package.
        epochs: instead of the configs' own number.

    Returns:
        The summary; ``summary['checks']`` says what held.
    """
    begin = time.perf_counter()
    MMLogger.get_instance('demo', log_level='ERROR')
    print('1/6  digits: 480 + 120 pictures of real handwritten digits', flush=True)
    data = out / 'data'
    make_digits(data)

    loaded: dict[str, Config] = {}
    checkpoints: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for number, (arm, name) in enumerate(ARMS.items(), 2):
        config = loaded[arm] = load_config(configs / name, data)
        if epochs is not None:
            config.max_epochs = config.train_cfg.max_epochs = config.param_scheduler[1].T_max = epochs
        print(f'{number}/6  training {arm}: {config.train_cfg.max_epochs} epochs, {name}', flush=True)
        start = time.perf_counter()
        checkpoints[arm] = train_quietly(config, out / Path(name).stem)
        seconds[arm] = time.perf_counter() - start

    print('5/6  folding, and loading the result where asr_downstream cannot be imported', flush=True)
    shipped = out / 'shipped' / 'detector.pth'
    trained = load_config(configs / ARMS['ASR(SE)'], data)
    report = fold_checkpoint(trained, checkpoints['ASR(SE)'], shipped)
    metrics, detections = test_elsewhere(tools, shipped)
    calibrated = out / 'shipped' / 'dia.pth'
    means = fold_checkpoint(
        load_config(configs / ARMS['DIA'], data), checkpoints['DIA'], calibrated, calibrate=CALIBRATION
    )

    print('6/6  evaluating', flush=True)
    models = {arm: load_detector(loaded[arm], checkpoints[arm])[0] for arm in ARMS}
    results = {arm: evaluation.evaluate(loaded[arm], model, arm) for arm, model in models.items()}
    models[FOLDED] = load_detector(load_config(shipped.with_suffix('.py')), shipped)[0]
    models[MEANS] = load_detector(load_config(calibrated.with_suffix('.py')), calibrated)[0]
    results[MEANS] = evaluation.evaluate(loaded['DIA'], models[MEANS], MEANS)
    image = evaluation.first_image(loaded['stock'])
    results[FOLDED] = evaluation.described(models[FOLDED], FOLDED, metrics, detections, image)
    order = ['stock', 'ASR(SE)', FOLDED, 'DIA', MEANS]
    models = {arm: models[arm] for arm in order}
    results = {arm: results[arm] for arm in order}
    times = evaluation.measure_latency(models, image)
    for arm, result in results.items():
        result.latency_ms = median(times[arm])
    difference = comparing.differences(results['ASR(SE)'].detections, results[FOLDED].detections)

    summary = {
        'arms': {arm: result.as_dict() for arm, result in results.items()},
        'folded_against_unfolded': difference._asdict(),
        'feature_map_difference': report['feature_map_difference'],
        'dia_calibration': means['calibration'],
        'training_seconds': {arm: round(s, 1) for arm, s in seconds.items()},
        'sites': len(describe(models['ASR(SE)']).sites),
        'checks': {
            'all_learn_AP50_at_least_0.5': all(results[a].metrics['AP50'] >= 0.5 for a in ARMS),
            'folded_AP_equals_unfolded_AP': metrics.items() <= results['ASR(SE)'].metrics.items(),
            'same_detections': difference.unmatched == 0 and difference.boxes_px < 0.01 and difference.scores < 1e-3,
            'folded_have_the_parameters_of_stock': all(
                results[arm].parameters == results['stock'].parameters for arm in (FOLDED, MEANS)
            ),
        },
        'seed': loaded['stock'].randomness.seed,
        'versions': versions(),
        'wall_seconds': round(time.perf_counter() - begin, 1),
    }
    draw(out / 'detections.png', data, results)
    write_json(out / 'summary.json', summary)
    print(table(results))
    print(
        f'ASR(SE), folded against unfolded: boxes differ by at most {difference.boxes_px:.1e} px, scores by '
        f'{difference.scores:.1e}, on {difference.images} images\n'
        f'DIA, gates replaced by their mean over {CALIBRATION.images} training pictures: feature maps change by '
        f'{means["calibration"]["output_change"]:.2%}\n'
        f'{shipped}, {calibrated.name}: stock RetinaNet checkpoints\n'
        f'{out / "detections.png"}: what they detect\n{out / "summary.json"}: all numbers\n'
        f'{summary["wall_seconds"]:.0f} s in all'
    )
    return summary


def train_quietly(config: Config, work_dir: Path) -> Path:
    """Train with one line an epoch; the full log is in ``work_dir``."""
    from asr_downstream.detection.training.train import prepare, train

    config.log_level = 'ERROR'
    config.val_dataloader = config.val_evaluator = config.val_cfg = None  # evaluated once, at the end
    shutil.rmtree(work_dir, ignore_errors=True)  # of an earlier demo
    prepare(config, work_dir)
    with redirect_stdout(io.StringIO()):
        checkpoint = train(config, [EpochLine()])
    assert checkpoint is not None, 'the configs of the demo write checkpoints'
    return checkpoint


def test_elsewhere(tools: Path, shipped: Path) -> tuple[dict[str, float], dict[Any, Detections]]:
    """Evaluate the shipped files in a process that refuses this package; return metrics and detections.

    Raises:
        AsrError: that process failed.
    """
    out = shipped.with_name('test')
    command = [sys.executable, '-W', 'ignore', tools / 'test_stock.py', shipped.with_suffix('.py'), shipped]
    done = subprocess.run([*map(str, command), '--out', str(out)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AsrError(f'plain MMDetection could not run {shipped}: {done.stderr.strip().splitlines()[-1]}')
    metrics = evaluation.metrics_of(json.loads(out.with_suffix('.json').read_text()))
    found = load_file(out.with_suffix('.safetensors'))
    ids = {key.partition('.')[0] for key in found}
    return metrics, {int(i): (found[f'{i}.bboxes'], found[f'{i}.scores'], found[f'{i}.labels']) for i in ids}


def draw(out: Path, data: Path, results: dict[str, Evaluation]) -> None:
    """Draw the first validation pictures: what is there, and what each arm finds."""
    content = read_annotations(data / 'annotations' / 'val.json')
    images = {i['id']: data / 'val' / i['file_name'] for i in content['images'][:PICTURES]}
    truth: dict[Any, Detections] = {}
    for image in images:
        own = [a for a in content['annotations'] if a['image_id'] == image]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in own)])
        truth[image] = boxes, torch.ones(len(own)), torch.tensor([a['category_id'] - 1 for a in own])
    arms = {'truth': truth, **{name: result.detections for name, result in results.items()}}
    captions = {name: f'AP {result.metrics["AP"]:.3f}' for name, result in results.items()}
    draw_detections(out, images, arms, CLASSES, captions=captions)


def table(results: dict[str, Evaluation]) -> str:
    """One column an arm."""
    arms = list(results.values())
    found = Table('', *results, title='digits, 120 validation pictures, last epoch')
    for column in found.columns[1:]:
        column.justify = 'right'
    for name in results[FOLDED].metrics:  # plain MMDetection scored those
        found.add_row(name, *(evaluation.metric(arm.metrics[name]) for arm in arms))
    found.add_row('parameters', *(f'{arm.parameters:,}' for arm in arms))
    found.add_row('GMACs', *(f'{arm.gmacs:.4f}' for arm in arms))
    found.add_row('median latency / stock', *(f'{arm.latency_ms / arms[0].latency_ms:.2f}' for arm in arms))
    return render(found)
