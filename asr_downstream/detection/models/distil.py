"""Detectors that learn from a teacher (FAR, stage 1): the task's loss, and a distance at every replaced attention.

``distil=dict(...)`` of ``type='asr_downstream.RetinaNet'``, or any other detector. The detector is the student itself,
so its checkpoints are those of the same config without ``distil``. The teacher is no submodule: it is in no checkpoint,
no optimiser and no average of weights, and is read when a training starts, not for a test.
"""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from asr_downstream.detection.config import load_config
from asr_downstream.detection.models.detectors import load_detector
from asr_downstream.errors import PlugError, did_you_mean
from asr_downstream.far.distil.loss import Distances
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.replace import Place, find_attentions
from asr_downstream.far.model.trainable import STUDENTS, learning
from asr_downstream.files.configs import plain
from asr_downstream.plugging.learning.restrict import keep_statistics
from asr_downstream.plugging.plug import own_random_stream

__all__ = ['DistilledDetector', 'Distilling']

TAKES = ('teacher', 'distance', 'task_weight', 'learns')


class Distilling:
    """Teacher and distance of a student, which is passed in, so that copies of a student share its teacher.

    Args:
        student: the detector; what does not learn is frozen.
        spec: ``teacher=dict(config=..., checkpoint=...)``, of the stock detector; ``distance=dict(type='MSE',
            feature='attention', weight=1.0)``, a key of `DISTANCES`, and ``'attention'`` or ``'block'``, or a list of
            them; both or neither: then the task alone trains. ``task_weight=1.0``. ``learns='replacements'``,
            ``'blocks'`` or ``'all'``: see `asr_downstream.far.distil.task.learning`.

    Raises:
        PlugError: the keys do not fit together, or nothing is replaced.
    """

    def __init__(self, student: nn.Module, spec: Any) -> None:
        spec = plain(spec)
        for key in spec:
            if key not in TAKES:
                raise PlugError(f'distil: takes no {key!r}; {did_you_mean(key, TAKES)}')
        if not any(True for _ in mixers(student)):
            raise PlugError(
                f"distil: no attention of {type(student).__name__} is replaced; give replace=dict(type='FAR') to the "
                f'backbone or to the detector'
            )
        self.files = spec.get('teacher')
        self.task_weight = spec.get('task_weight', 1.0)
        self.distance: Distances | None = None
        if (self.files is None) != (spec.get('distance') is None):
            raise PlugError('distil: teacher and distance go together; give both, or neither for the task alone')
        if self.files is not None:
            if not isinstance(self.files, dict) or self.files.keys() != {'config', 'checkpoint'}:
                raise PlugError(f"distil: expected teacher=dict(config='...', checkpoint='...'), got {self.files!r}")
            self.distance = Distances(spec['distance'], feature='attention')
        learns = spec.get('learns', 'replacements')
        if learns not in STUDENTS:
            raise PlugError(f'distil: learns={learns!r} is not known; {did_you_mean(str(learns), STUDENTS)}')
        learning(student, learns)
        self.teacher: Any = None
        self.places: list[Place] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Distilling:
        return self

    def load(self, student: nn.Module) -> None:
        """Read the teacher, once, and find the attentions that the student has replaced.

        Raises:
            AsrError: it cannot be read, has no such attentions, or the feature cannot be seen in them.
        """
        if self.distance is None or self.teacher is not None:
            return
        with own_random_stream(0, 'teacher'):  # the student's training draws the same numbers without a teacher
            config = load_config(Path(self.files['config']), needs_data=False)
            teacher, _ = load_detector(config, Path(self.files['checkpoint']))
        places: list[Place] = []
        for path, module in student.named_modules():
            spec: Any = module.__dict__.get('replace_spec')
            if spec is None:
                continue
            try:
                part = teacher.get_submodule(path)
            except AttributeError:
                raise PlugError(f'distil: the teacher of {self.files["config"]} has no {path}') from None
            found = find_attentions(part, spec['layers'], spec.get('heads'), spec.get('projection'))
            self.distance.check(spec.get('variant', 'M3'), found)
            places += [changed(place, path=f'{path}.{place.path}'.lstrip('.')) for place in found]
        self.places = places
        self.teacher = teacher.requires_grad_(False).eval()

    def losses(self, student: nn.Module, forward: Any, inputs: Tensor, samples: Any) -> dict[str, Any]:
        """Losses of the task, times ``task_weight``, and ``loss_far``.

        Args:
            student: the detector.
            forward: its own loss, of inputs and samples.
            inputs: images as the student's preprocessor has made them; the teacher sees the same.
            samples: of MMDetection.
        """
        if self.distance is None:
            return self.weighed(forward(inputs, samples))
        self.load(student)
        teacher = self.teacher.to(inputs.device)

        def teach() -> None:
            if all(place.path.startswith('backbone.') for place in self.places):
                teacher.backbone(inputs)  # neck and head would add nothing
            else:
                teacher(inputs, samples, mode='tensor')

        losses, total, _ = self.distance.measure(teacher, teach, student, lambda: forward(inputs, samples), self.places)
        return {**self.weighed(losses), 'loss_far': total}

    def weighed(self, losses: dict[str, Any]) -> dict[str, Any]:
        """Losses times ``task_weight``; MMDetection adds up what has "loss" in its name."""
        if self.task_weight == 1:
            return losses
        weight = self.task_weight
        return {
            name: ([weight * v for v in value] if isinstance(value, list | tuple) else weight * value)
            if 'loss' in name
            else value
            for name, value in losses.items()
        }


class DistilledDetector:
    """Mixin of detectors: ``distil``, see `Distilling`."""

    distil: Distilling | None = None

    def __init__(self, *args: Any, distil: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if distil is not None:
            self.distil = Distilling(self, distil)  # type: ignore[arg-type]

    def init_weights(self) -> None:
        """Initialise as before, and read the teacher: a training that cannot have it stops here."""
        super().init_weights()  # type: ignore[misc]
        if self.distil is not None:
            self.distil.load(self)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; batch norms that do not learn keep their statistics too."""
        result = super().train(mode)  # type: ignore[misc]
        if mode and self.distil is not None:
            keep_statistics(self)  # type: ignore[arg-type]
        return result

    def loss(self, batch_inputs: Tensor, batch_data_samples: Any) -> Any:
        """Losses of the detector, and the distance to its teacher."""
        forward = super().loss  # type: ignore[misc]
        if self.distil is None:
            return forward(batch_inputs, batch_data_samples)
        return self.distil.losses(self, forward, batch_inputs, batch_data_samples)  # type: ignore[arg-type]
