"""Train a small classifier that has squeeze-and-excitation, and see how much of it can be removed.

    python tools/native.py --data cifar10-train.zip                        # a RegNet-Y, 12 epochs
    python tools/native.py --data cifar10-train.zip --model efficientnet --epochs 8

Images in a folder a class, in a folder or a zip file; every tenth is held out. Writes OUT/MODEL-SEED.pt, from where a
training that was stopped goes on, and OUT/MODEL-SEED.json: for several budgets of accuracy, which blocks
`asr_downstream.fold_native` removed, their stripe ratios, accuracy on the images held out, parameters and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, fold, print."""
    parser = cli.parser(__doc__)
    parser.add_argument('--data', type=Path, required=True, help='a zip file or folder of images, a folder a class')
    parser.add_argument('--model', choices=['regnet-y', 'efficientnet'], default='regnet-y', help='default: regnet-y')
    parser.add_argument('--epochs', type=cli.count, default=12, help='of the training (default: 12)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and batches (default: 0)')
    parser.add_argument('--minutes', type=cli.finite, default=60.0, help='most for training (default: 60)')
    parser.add_argument('--threads', type=cli.count, default=1, help='of PyTorch (default: 1)')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/native'), help='folder (default: work_dirs/native)')
    args = parser.parse_args(argv)

    import torch
    from bench.native import run

    torch.set_num_threads(args.threads)
    run(args.model, args.data, args.out, args.epochs, args.seed, args.minutes)


if __name__ == '__main__':
    cli.run(main)
