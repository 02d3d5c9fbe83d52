"""Evaluate a folded checkpoint with plain MMDetection, in a process that refuses to import asr_downstream.

    python tools/test_stock.py shipped/detector.py shipped/detector.pth --out shipped/test

The weights are read with weights_only=True and loaded with strict=True. Writes OUT.json with the metrics and
OUT.safetensors with the detections, image by image. Without --out it only loads the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import stock_only  # noqa: F401


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=Path, help='stock config')
    parser.add_argument('checkpoint', type=Path, help='folded checkpoint, .pth or .safetensors')
    parser.add_argument('--out', type=Path, help='where to write, without ending')
    args = parser.parse_args(argv)
    if args.out is not None and not (args.out.parent.is_dir() and os.access(args.out.parent, os.W_OK)):
        parser.error(f'{args.out}: its folder is not there, or cannot be written')
    if args.config.suffix != '.py':  # MMEngine's reader of .yaml files runs what they name
        parser.error(f'{args.config}: expected a .py config, as tools/fold.py writes it')

    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.evaluator import Evaluator
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner
    from safetensors.torch import load_file, save_file

    config = Config.fromfile(args.config)
    init_default_scope('mmdet')
    if 'backbone' in config.model:
        config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    for path in config.get('removed_attention', ()):  # as the model card says
        parent, _, name = path.rpartition('.')
        setattr(model.get_submodule(parent), name, torch.nn.Identity())
    if args.checkpoint.suffix == '.safetensors':
        state = load_file(args.checkpoint)
    else:
        state = torch.load(args.checkpoint, map_location='cpu', weights_only=True)['state_dict']
    model.load_state_dict(state, strict=True)
    model.eval()
    print(
        f'{args.checkpoint}: {len(state)} tensors loaded strictly into {type(model).__module__}.{type(model).__name__}'
    )
    if args.out is None:
        return

    MMLogger.get_current_instance().setLevel('WARNING')
    detections = {}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        loader = Runner.build_dataloader(config.test_dataloader)
        evaluator = Evaluator(config.test_evaluator)
        evaluator.dataset_meta = loader.dataset.metainfo
        for batch in loader:
            samples = model.test_step(batch)
            evaluator.process(data_samples=samples, data_batch=batch)
            for sample in samples:
                found = sample.pred_instances
                for key in ('bboxes', 'scores', 'labels'):
                    detections[f'{sample.img_id}.{key}'] = found[key].contiguous()
        metrics = evaluator.evaluate(len(loader.dataset))
    save_file(detections, args.out.with_suffix('.safetensors'))
    args.out.with_suffix('.json').write_text(json.dumps(metrics, indent=2))
    print(', '.join(f'{name.removeprefix("coco/")} {value:.3f}' for name, value in metrics.items()))


if __name__ == '__main__':
    main()
