"""Sample from a folded pipeline with plain diffusers, in a process that refuses to import asr_downstream.

    python tools/sample_stock.py shipped/digits --out shipped/digits.safetensors --seeds 0 1 2 3
    python tools/sample_stock.py shipped/digits --out digits.safetensors --seeds 0 1 2 3 --sampler DDIM --steps 20

Each seed gives an image; OUT holds ``images`` (N, C, H, W) in [0, 1], float32.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import stock_only  # noqa: F401


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, load, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='pipeline folder')
    parser.add_argument('--out', type=Path, required=True, help='.safetensors to write')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='one an image')
    parser.add_argument('--sampler', choices=['DDPM', 'DDIM'], default='DDIM', help='default: DDIM')
    parser.add_argument('--steps', type=int, default=50, help='inference steps (default: 50)')
    parser.add_argument('--batch-size', type=int, default=64, help='images a forward (default: 64)')
    args = parser.parse_args(argv)
    if not (args.folder / 'model_index.json').is_file():
        parser.error(f'{args.folder}: is no pipeline of diffusers (it has no model_index.json)')
    try:  # before the work
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out.parent) as file:
            file.write(b'x')
    except OSError as error:
        parser.error(f'{args.out}: cannot be written ({error.strerror})')

    import torch
    from diffusers import DDIMScheduler, DDPMPipeline
    from safetensors.torch import save_file

    try:
        pipeline = DDPMPipeline.from_pretrained(args.folder, local_files_only=True)
    except Exception as error:  # libraries raise anything for damaged files
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        sys.exit(f'error: {args.folder}: cannot be loaded ({first[:200]})')
    pipeline.set_progress_bar_config(disable=True)
    if args.sampler == 'DDIM':
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    found = []
    for start in range(0, len(args.seeds), args.batch_size):
        streams = [torch.Generator().manual_seed(s) for s in args.seeds[start : start + args.batch_size]]
        images = pipeline(len(streams), streams, num_inference_steps=args.steps, output_type='pt').images
        found.append(images.float().cpu())
    images = torch.cat(found)
    if not images.isfinite().all():
        sys.exit(f'error: {args.folder}: its images are not finite; were its weights damaged?')
    aside = args.out.with_name(f'.{args.out.name}.tmp')
    try:
        save_file({'images': images}, aside)
        os.replace(aside, args.out)
    except Exception as error:  # safetensors has its own class
        sys.exit(f'error: {args.out}: cannot be written ({error})')
    finally:
        aside.unlink(missing_ok=True)
    unet = type(pipeline.unet)
    print(f'{args.out}: {len(args.seeds)} images from a {unet.__module__}.{unet.__name__}')


if __name__ == '__main__':
    main()
