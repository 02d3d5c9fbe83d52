"""Ablations of diffusion models: `train-diffusion`, `evaluate`, FID."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asr_downstream.commands.ablation.arms import arm_of
from asr_downstream.commands.ablation.kinds.base import Kind, Plan, Run
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import read_json

__all__ = ['Diffusion']

CONFIG_FILE = 'config.py'
MODELS = ('UNet2DModel', 'UNet2DConditionModel', 'DiTTransformer2DModel')
UNFOLDED = 'unfolded'


class Diffusion(Kind):
    """Models of diffusers. One encoder for all runs gives the features of FID and KID."""

    name = 'diffusion'
    folder = 'diffusion/configs'
    metrics = {'fid': Metric('FID', higher=False), 'kid': Metric('KID', higher=False, form='.4f')}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return (config.get('model') or {}).get('type') in MODELS

    def pretrained(self, config: Mapping[str, Any]) -> str | None:
        return config['model'].get('pretrained_model_name_or_path')

    def prepare(self, plan: Plan) -> None:
        from asr_downstream.diffusion.config import load_config
        from asr_downstream.diffusion.evaluation.encoder import train_encoder
        from asr_downstream.diffusion.models.components import build_parts

        if '--extractor' in plan.test or encoder_of(plan).is_file():
            return
        images = build_parts(load_config(plan.config, plan.overrides, plan.data), data=True).images
        assert images is not None
        train_encoder(images, encoder_of(plan))

    def train(self, run: Run) -> list[str]:
        from asr_downstream.engine.state.checkpoints import checkpoints_in

        folder, seed = str(run.folder), str(run.seed)
        words = ['train-diffusion', str(run.config), '--output-dir', folder, '--seed', seed]
        return words + run.plan.given('--data') + (['--resume'] if checkpoints_in(run.folder) else [])

    def test(self, run: Run) -> list[str]:
        plan = run.plan
        shared = [] if '--extractor' in plan.test else ['--extractor', str(encoder_of(plan))]
        data = [] if plan.data is None else ['--data', str(plan.data)]
        return ['evaluate', str(run.folder), *run.folding, *shared, *data, *plan.test]

    def is_run(self, folder: Path) -> bool:
        try:
            found = read_json(folder / 'evaluation.json')
        except (OSError, ValueError):
            return False
        return isinstance(found, list) and (folder / CONFIG_FILE).is_file()

    def read(self, folder: Path) -> Record:
        from asr_downstream.diffusion.evaluation.results import read_results
        from asr_downstream.diffusion.runs import read_run_config

        config = read_run_config(folder)
        total = config.max_train_steps
        found = [result for result in read_results(folder) if result.step == total]
        base = next((result for result in reversed(found) if result.arm == UNFOLDED), None)
        if base is None:
            raise DataError(f'{folder}: was not evaluated at its last step, {total}; asr-downstream evaluate {folder}')
        same = [result for result in found if result.provenance == base.provenance and result.weights == base.weights]
        folded = next((result for result in reversed(same) if result.arm != UNFOLDED), None)
        provenance = dict(base.provenance)
        versions = provenance.pop('versions', {})
        how = None if folded is None else 'exact' if folded.arm == 'folded' else 'calibrated'
        return Record(
            arm=arm_of(config.plug),
            seed=config.seed,
            trained=base.numbers,
            folded=None if folded is None else folded.numbers,
            folding=how,
            setting={'steps of training': total, 'batch': config.train_batch_size, **provenance},
            about={'run': folder.name, 'folder': str(folder), 'sha256': base.weights, 'versions': versions},
        )


def encoder_of(plan: Plan) -> Path:
    """File of the encoder that all runs of an ablation are measured with."""
    return plan.out / 'encoder.safetensors'
