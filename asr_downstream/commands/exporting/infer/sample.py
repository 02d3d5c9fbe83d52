"""Sample images (DDIM; of a flow Euler) with model.onnx beside this file. Needs onnxruntime, numpy and pillow.

python infer.py --images 16 --steps 50 --seed 0 --out samples.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def open_model(path: Path, threads: int = 0) -> tuple[Any, dict[str, Any]]:
    """Open a file; returns it, and the schedule that it was trained with."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return session, json.loads(session.get_modelmeta().custom_metadata_map['schedule'])


def sample(session: Any, schedule: dict[str, Any], noise: np.ndarray, steps: int) -> np.ndarray:
    """Turn noise ``(n, C, H, W)`` into images in [-1, 1]."""
    if schedule['prediction_type'] == 'flow':
        return follow(session, schedule, noise, steps)
    alphas, kind = np.asarray(schedule['alphas_cumprod']), schedule['prediction_type']
    every = len(alphas) // steps
    x = noise.astype(np.float32)
    for t in range((steps - 1) * every, -1, -every):
        now, then = alphas[t], alphas[t - every] if t >= every else 1.0
        found = session.run(None, {'sample': x, 'timestep': np.full(len(x), t, np.int64)})[0]
        signal, rest = np.sqrt(now), np.sqrt(1 - now)
        if kind == 'epsilon':
            clean, eps = (x - rest * found) / signal, found
        elif kind == 'sample':
            clean, eps = found, (x - signal * found) / rest
        else:  # v_prediction
            clean, eps = signal * x - rest * found, signal * found + rest * x
        if schedule['clip_sample']:
            clean = clean.clip(-1, 1)
        x = (np.sqrt(then) * clean + np.sqrt(1 - then) * eps).astype(np.float32)
    return x


def follow(session: Any, schedule: dict[str, Any], noise: np.ndarray, steps: int) -> np.ndarray:
    """The same along a flow, whose model predicts noise - image; the steps of FlowMatchEulerDiscreteScheduler."""
    sigmas = np.linspace(schedule['sigma_max'], schedule['sigma_min'], steps)
    sigmas = schedule['shift'] * sigmas / (1 + (schedule['shift'] - 1) * sigmas)
    x = noise.astype(np.float32)
    for now, then in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        t = np.full(len(x), now * schedule['timesteps'], np.float32)
        found = session.run(None, {'sample': x, 'timestep': t})[0]
        x = (x + (then - now) * found).astype(np.float32)
    return x


def grid(images: np.ndarray) -> Image.Image:
    """Put images beside and below each other."""
    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    pixels = ((images / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
    sheet = np.zeros((rows * height, columns * width, channels), np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image.transpose(1, 2, 0)
    return Image.fromarray(sheet[..., 0] if channels == 1 else sheet)


def main() -> None:
    """Parse the command line, sample, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', type=Path, default=Path(__file__).with_name('model.onnx'))
    parser.add_argument('--images', type=int, default=16, help='default: 16')
    parser.add_argument('--steps', type=int, default=50, help='default: 50')
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    parser.add_argument('--threads', type=int, default=0, help='default: all')
    parser.add_argument('--out', type=Path, default=Path('samples.png'), help='default: samples.png')
    args = parser.parse_args()
    session, schedule = open_model(args.model, args.threads)
    noise = np.random.default_rng(args.seed).standard_normal((args.images, *schedule['shape']))
    most = schedule.get('timesteps') or len(schedule['alphas_cumprod'])
    grid(sample(session, schedule, noise, min(args.steps, most))).save(args.out)
    print(args.out)


if __name__ == '__main__':
    main()
