"""`tools/prepare_data.py check`: everything that can be found out about a data set without training on it."""

from __future__ import annotations

from pathlib import Path

from asr_downstream.detection.data.coco import examine_set, summary
from asr_downstream.detection.data.fit import find_splits
from asr_downstream.errors import DataError

__all__ = ['check_set']


def check_set(root: Path) -> None:
    """Examine both splits of a COCO-format data set, with all their images, and print what is found.

    Raises:
        DataError: a training would be wrong.
    """
    wrong = 0
    shown: dict[Path, str] = {}
    for split, files in find_splits(root).items():
        print(f'{split}: {files.annotations}, images in {files.images}')
        content, findings = examine_set(files.annotations, files.images, scored=split != 'train')
        print(f'  {summary(content, named=True)}')
        for finding in findings:
            print(f'  {finding}')
        wrong += sum(finding.wrong for finding in findings)
        names = [i['file_name'] for i in content['images'] if isinstance(i['file_name'], str) and i['file_name']]
        ours = {(files.images / name).resolve(): split for name in names if '\0' not in name and name.isprintable()}
        if shared := sorted(path.name for path in shown.keys() & ours.keys()):
            print(f'  note: {len(shared):,} images are in {shown[next(iter(shown))]} too ({", ".join(shared[:3])})')
        shown |= ours
    if wrong:
        raise DataError(f'{root}: {wrong} findings would make a training wrong, see above')
