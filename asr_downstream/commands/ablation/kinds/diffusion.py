"""Ablations of diffusion models: `train-diffusion`, `evaluate`, FID."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asr_downstream.commands.ablation.arms import arm_of
from asr_downstream.commands.ablation.kinds.base import Kind, Plan, Run, setting_of
from asr_downstream.commands.ablation.records import Record
from asr_downstream.commands.ablation.statistics import Metric
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import read_json, write_json
from asr_downstream.files.configs import plain

__all__ = ['Diffusion']

CONFIG_FILE = 'config.py'
MODELS = ('UNet2DModel', 'UNet2DConditionModel', 'DiTTransformer2DModel')
UNFOLDED = 'unfolded'


class Diffusion(Kind):
    """Models of diffusers. One encoder for all runs gives the features of FID and KID."""

    name = 'diffusion'
    folder = 'diffusion/configs'
    result = 'evaluation.json'
    metrics = {'fid': Metric('FID', higher=False), 'kid': Metric('KID', higher=False, form='.4f')}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return (config.get('model') or {}).get('type') in MODELS

    def pretrained(self, config: Mapping[str, Any]) -> str | None:
        return config['model'].get('pretrained_model_name_or_path')

    def prepare(self, plan: Plan) -> None:
        from asr_downstream.diffusion.config import load_config
        from asr_downstream.diffusion.evaluation.encoder import train_encoder
        from asr_downstream.diffusion.models.components import build_parts

        if '--extractor' in plan.test:
            return
        config = load_config(plan.config, plan.overrides, plan.data)
        encoder, made_of = encoder_of(plan), json.loads(json.dumps({'data': plain(config.data)}, default=str))
        note = encoder.with_suffix('.json')
        if encoder.is_file() and note.is_file() and read_json(note) == made_of:
            return
        images = build_parts(config, data=True).images
        assert images is not None
        note.unlink(missing_ok=True)
        train_encoder(images, encoder)
        write_json(note, made_of)

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
            found = read_json(folder / self.result)
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
            setting={'steps of training': total, **setting_of(config), **provenance},
            about={'run': folder.name, 'folder': str(folder), 'sha256': base.weights, 'versions': versions},
        )


def encoder_of(plan: Plan) -> Path:
    """File of the encoder that all runs of an ablation are measured with."""
    return plan.out / 'encoder.safetensors'
