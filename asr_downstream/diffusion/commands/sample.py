"""Generate images with a trained diffusion model.

    asr-downstream sample work_dirs/unet-w32-asr-se_digits
    asr-downstream sample RUN --num-samples 1000 --single --sampler DPM-Solver++ --steps 20   # also of flow matching
    asr-downstream sample RUN --show cat dog --guidance-scale 3     # of a conditioned model: its classes, or prompts
    asr-downstream sample RUN/checkpoint-500 --fold                 # an earlier checkpoint; its folded, stock model
    python -m asr_downstream.console.torchrun --standalone --nproc_per_node 8 -m asr_downstream sample RUN

Writes RUN/images/grid.png, of conditioned models with the class or prompt below each image, and with --single one PNG
an image. Image n of a seed is the same with every batch size, up to rounding. Several processes share the batches, and
write the files of one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asr_downstream.console import cli

if TYPE_CHECKING:
    from asr_downstream.console.processes import Processes


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line, generate and write."""
    parser = cli.parser(__doc__, 'sample', names)
    parser.add_argument('run', type=Path, help='folder of a run, for its newest checkpoint, or of a checkpoint')
    parser.add_argument('--out', type=Path, help='folder (default: RUN/images)')
    cli.add_sampling(parser, num_samples=64)
    parser.add_argument('--show', nargs='+', metavar='NAME', help='classes, or prompts, to generate in turn')
    parser.add_argument('--single', action='store_true', help='write each image as a file, too')
    parser.add_argument('--columns', type=cli.count, help='of the grid')
    parser.add_argument('--fold', action='store_true', help='fold first, and sample from the stock model')
    args = parser.parse_args(argv)

    from asr_downstream.engine.launch import end_processes, start_sharing

    processes = start_sharing()
    processes.together(lambda: sample(args, processes))
    end_processes()


def sample(args: argparse.Namespace, processes: Processes) -> None:
    """Generate and write; all processes of a launch share it."""
    import torch

    from asr_downstream.diffusion.evaluation.fold import fold_run
    from asr_downstream.diffusion.evaluation.pictures import save_grid, save_images
    from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate, sampler_name
    from asr_downstream.diffusion.runs import load_run
    from asr_downstream.files.atomic import check_writable

    run = load_run(args.run, ema=cli.ema(args))
    out = args.out or run.folder / 'images'
    check_writable(out)
    if args.show:
        run.parts.condition.choose(args.show)
    name = sampler_name(args.sampler, run.parts.scheduler)
    model = fold_run(run)[0] if args.fold else run.parts.model
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    run.parts.to(device)
    sampler = build_sampler(name, run.parts.scheduler, args.sampler_kwargs, run.parts.vae is not None)
    images = generate(
        model.to(device), run.parts, sampler, range(args.num_samples),
        args.steps, args.seed, args.batch_size, args.guidance_scale, f'{args.num_samples} images', processes=processes,
    )  # fmt: skip
    if not processes.is_first:
        return
    captions = [run.parts.condition.caption(number) for number in range(args.num_samples)]
    save_grid(out / 'grid.png', images, args.columns, captions)
    if args.single:
        save_images(out, images, range(args.num_samples))
    weights = 'averaged weights' if run.ema else 'weights as trained'
    print(f'{out}: {len(images)} images of step {run.step}, {weights}, {name}, {args.steps} steps')
