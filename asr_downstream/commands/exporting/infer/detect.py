"""Find objects in images with detector.onnx, which is beside this file. Needs onnxruntime, numpy and pillow.

python infer.py photo.jpg                            # one line of JSON an image
python infer.py a.jpg b.jpg --draw found             # and pictures with boxes, in the folder found/
python infer.py photo.jpg --score 0.5 --model detector.int8.onnx
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps


def open_model(path: Path, threads: int = 0) -> tuple[Any, list[str]]:
    """Open a file; returns it, and the names of the classes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return session, json.loads(session.get_modelmeta().custom_metadata_map.get('classes', '[]'))


def detect(session: Any, path: Path, score: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes ``(n, 4)`` as x1, y1, x2, y2 in pixels, scores and labels, the best first."""
    with Image.open(path) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    boxes, scores, labels = session.run(None, {'image': pixels})
    kept = scores >= score
    return boxes[kept], scores[kept], labels[kept]


def draw(path: Path, out: Path, boxes: np.ndarray, texts: list[str]) -> None:
    """Write a picture with boxes."""
    with Image.open(path) as image:
        picture = ImageOps.exif_transpose(image).convert('RGB')
    pen = ImageDraw.Draw(picture)
    for box, text in zip(boxes.tolist(), texts, strict=True):
        pen.rectangle(box, outline=(255, 60, 0), width=2)
        pen.text((box[0] + 2, box[1] + 1), text, fill=(255, 60, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)


def main() -> None:
    """Parse the command line, detect, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', type=Path)
    parser.add_argument('--model', type=Path, default=Path(__file__).with_name('detector.onnx'))
    parser.add_argument('--score', type=float, default=0.3, help='least score (default: 0.3)')
    parser.add_argument('--draw', type=Path, metavar='DIR', help='folder for pictures')
    parser.add_argument('--threads', type=int, default=0, help='default: all')
    args = parser.parse_args()
    session, classes = open_model(args.model, args.threads)
    for path in args.images:
        boxes, scores, labels = detect(session, path, args.score)
        names = [classes[label] if label < len(classes) else str(label) for label in labels.tolist()]
        rows = zip(names, scores.tolist(), boxes.tolist(), strict=True)
        found = [{'class': n, 'score': round(s, 4), 'box': [round(v, 2) for v in b]} for n, s, b in rows]
        print(json.dumps({'image': str(path), 'found': found}))
        if args.draw is not None:
            texts = [f'{row["class"]} {row["score"]:.2f}' for row in found]
            draw(path, args.draw / f'{path.stem}.png', boxes, texts)


if __name__ == '__main__':
    main()
