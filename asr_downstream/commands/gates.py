"""Adapters: what gates have learnt as a file of some kilobytes, and its way into a base.

    asr-downstream gates save CONFIG work_dirs/NAME/epoch_4.pth night.safetensors    # of a detector
    asr-downstream gates save work_dirs/unet-w32-asr-se_digits night.safetensors     # of a run of a diffusion model
    asr-downstream gates save CONFIG CHECKPOINT night.safetensors --push-to-hub USER/night
    asr-downstream gates list night.safetensors
    asr-downstream gates apply base.pth night.safetensors shipped/night.pth --config CONFIG
    asr-downstream gates apply stock/pipeline night.safetensors rain.safetensors shipped/both --strength 1 0.5
    asr-downstream gates convert ia3/adapter_model.safetensors base.pth ia3.safetensors

Save: the training must have left the base as it was, outside of heads; it is compared with what the training has
remembered, or with --base. Before the file is written, it is applied and compared with the fold, bit for bit.

Apply: writes strict stock weights, in the layout of the base. BASE is a checkpoint of MMDetection (with --config, or
base.py beside it, the stock config is written too, and the weights are loaded into its model strictly), any state dict
in .pth or .safetensors, or a folder of diffusers or transformers. Several adapters work one after another.

Convert: IA3 of peft, IA3 and norms of LyCORIS; what is no scale of channels (LoRA, LoKr, ...) is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from asr_downstream.console import cli
from asr_downstream.errors import AsrError
from asr_downstream.files.hub import check_repo, push
from asr_downstream.files.ready import find_config


def main(argv: Sequence[str] | None = None, names: cli.Names = str) -> None:
    """Parse the command line and do what its first word says."""
    parser = cli.parser(__doc__, 'gates', names)
    words = parser.add_subparsers(dest='word', required=True, metavar='save|list|apply|convert')
    save = words.add_parser('save', help='write what the gates of a training have learnt')
    save.add_argument(
        'paths', type=Path, nargs='+', metavar='PATH', help='CONFIG CHECKPOINT OUT of a detector, or RUN OUT'
    )
    save.add_argument('--base', type=Path, help='weights that the training began with: a file, or a folder')
    save.add_argument(
        '--heads', nargs='+', metavar='PATTERN', help="weights that were trained too, or 'changed': all that differ"
    )
    save.add_argument('--learnt', action='store_true', help='keep the parameters of the gates, to train on exactly')
    save.add_argument('--weights', choices=['ema', 'raw'], help='diffusion: default: the average, if there is one')
    save.add_argument('--trust', action='store_true', help='detector: read what needs unpickling (can run code)')
    cli.add_hub(save)
    cli.add_options(save, 'detector: override the config')
    shown = words.add_parser('list', help='show what files hold')
    shown.add_argument('files', type=Path, nargs='+', metavar='FILE', help='adapters')
    apply = words.add_parser('apply', help='put adapters into a base')
    apply.add_argument('paths', type=Path, nargs='+', metavar='PATH', help='BASE ADAPTER ... OUT')
    apply.add_argument(
        '--strength', type=cli.finite, nargs='+', default=[1.0], metavar='S', help='one, or one an adapter (default: 1)'
    )
    apply.add_argument('--no-heads', action='store_true', help='leave trained heads out')
    apply.add_argument('--any-base', action='store_true', help='apply to weights that they were not made for')
    apply.add_argument('--config', type=Path, help='detector: of the training or stock; default: the .py beside BASE')
    apply.add_argument('--trust', action='store_true', help='read a BASE that needs unpickling (can run code)')
    convert = words.add_parser('convert', help='convert an adapter of peft or LyCORIS')
    convert.add_argument('source', type=Path, help='file, or folder of peft')
    convert.add_argument('base', type=Path, help='what it was trained on: a file of weights, or a folder')
    convert.add_argument('out', type=Path, help='file to write')
    args = parser.parse_args(argv)

    if args.word == 'save' and len(args.paths) not in (2, 3):
        save.error('expected RUN OUT, or CONFIG CHECKPOINT OUT')
    if args.word == 'save' and args.private and not args.push_to_hub:
        save.error('--private goes with --push-to-hub REPO')
    if args.word == 'save' and args.push_to_hub:
        check_repo(args.push_to_hub)
    if args.word == 'apply' and len(args.paths) < 3:
        apply.error('expected BASE ADAPTER ... OUT')
    if args.word == 'apply' and len(args.strength) not in (1, len(args.paths) - 2):
        apply.error(f'--strength: expected one number, or {len(args.paths) - 2}, one an adapter')
    {'save': save_adapter, 'list': show, 'apply': apply_adapters, 'convert': convert_adapter}[args.word](args)


def save_adapter(args: argparse.Namespace) -> None:
    """Write the adapter of a training."""
    out = args.paths[-1]
    heads = 'changed' if args.heads == ['changed'] else args.heads
    if len(args.paths) == 2:
        if args.paths[0].is_file():
            raise AsrError(f'{args.paths[0]}: is a file; expected RUN OUT, or for a detector CONFIG CHECKPOINT OUT')
        from asr_downstream.diffusion.export import save_adapter_of_run

        adapter = save_adapter_of_run(args.paths[0], out, heads, args.base, args.learnt, cli.ema(args))
    else:
        from asr_downstream.detection.config import load_config
        from asr_downstream.detection.export import save_adapter_of_detector

        config = load_config(find_config(args.paths[0], 'det_configs'), options=args.cfg_options, needs_data=False)
        adapter = save_adapter_of_detector(config, args.paths[1], out, heads, args.base, args.learnt, args.trust)
    print(adapter)
    if args.push_to_hub:
        files = {out.name: out, 'README.md': adapter_card(out, args.push_to_hub, str(adapter)).encode()}
        print(push(files, args.push_to_hub, args.private))


def adapter_card(path: Path, repo: str, table: str) -> str:
    """Model card of an adapter on the hub."""
    from asr_downstream.files.card import card_text

    text = f"""# {path.stem}

Gates that were trained on a frozen base, resolved to constants: they fold into it exactly; out comes the stock model.

```
{table}
```

```shell
hf download {repo} {path.name} --local-dir .
asr-downstream fold apply BASE {path.name} OUT
```
"""
    return card_text(text, path.stem, 'asr_downstream', {}, ('adapter', 'attention'))


def show(args: argparse.Namespace) -> None:
    """Print what files hold."""
    from asr_downstream.folding.adapters.file import list_gates

    for path in args.files:
        print(list_gates(path))


def apply_adapters(args: argparse.Namespace) -> None:
    """Put adapters into a base."""
    from asr_downstream.folding.adapters.apply import given
    from asr_downstream.folding.adapters.ship import apply_to_file, apply_to_folder

    base, *paths, out = args.paths
    strengths = args.strength * len(paths) if len(args.strength) == 1 else args.strength
    adapters = given(paths, strengths, not args.no_heads)
    config = args.config or base.with_suffix('.py')
    if base.is_dir():
        if args.config:
            raise AsrError(f'{args.config}: {base} is a folder, and --config is for the checkpoint of a detector')
        apply_to_folder(base, adapters, out, args.any_base)
        print(f'{out}: loads as {base} does; fold_report.json: adapters, hashes, versions')
    elif args.config or config.is_file():
        from asr_downstream.detection.config import load_config
        from asr_downstream.detection.export import apply_to_detector

        found = load_config(find_config(config, 'det_configs'), needs_data=False)
        apply_to_detector(found, base, adapters, out, args.any_base, args.trust)
        print(f'{out}: loads strictly into the stock config {out.with_suffix(".py")}')
    else:
        apply_to_file(base, adapters, out, args.any_base, args.trust)
        print(f'{out}: weights with the names of {base}; {out.with_suffix(".json")}: adapters, hashes, versions')


def convert_adapter(args: argparse.Namespace) -> None:
    """Convert an adapter of another library."""
    from asr_downstream.folding.adapters.folders import weights_at
    from asr_downstream.folding.adapters.foreign.convert import convert_gates

    print(convert_gates(args.source, args.out, weights_at(args.base)))
