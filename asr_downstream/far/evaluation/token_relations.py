"""Which token looks at which: attention maps of the teacher, gradients of the student, and how alike they are.

Teacher: softmax of query and key, mean over heads. Student: how much each token of the replacement's input changes each
token of its output, ``|d sum of channels of output n / d input m|`` summed over channels and heads (the analysis of the
FAR authors' code). Rows are scaled to sum to 1. The similarity is the cosine of two rows, mean over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.errors import PlugError
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.mixer import Mixer
from asr_downstream.far.model.replace import Place
from asr_downstream.files.atomic import write_atomically

__all__ = ['attention_maps', 'draw_relations', 'mixer_maps', 'similarity']

QUERY_KEY = (('q_proj', 'k_proj'), ('to_q', 'to_k'))


@torch.no_grad()
def attention_maps(model: nn.Module, places: Sequence[Place], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Attention of a stock model, mean over heads.

    Args:
        model: the teacher, in eval mode.
        places: its attentions, see `asr_downstream.far.model.replace.find_attentions`.
        inputs: arguments of a forward.

    Returns:
        Path -> ``(B, N, N)``; rows sum to 1.

    Raises:
        PlugError: an attention has no separate layers for query and key.
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    layers = {}
    for place in places:
        pair = next(
            (p for p in QUERY_KEY if all(isinstance(getattr(place.attention, n, None), nn.Linear) for n in p)), None
        )
        if pair is None:
            raise PlugError(f'{place.path}: query and key are not layers of their own, so its attention cannot be seen')
        layers[place.path] = pair
        for name in pair:
            path = f'{place.path}.{name}'
            handles.append(model.get_submodule(path).register_forward_hook(keep(path)))
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for place in places:
        q, k = (
            seen[f'{place.path}.{name}'].unflatten(-1, (place.heads, -1)).transpose(1, 2) for name in layers[place.path]
        )
        found[place.path] = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
    return found


def mixer_maps(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Influence of tokens on tokens in a replaced model; see the head of this file.

    Returns:
        Path -> ``(B, N, N)``; rows sum to 1.
    """
    tokens: dict[str, Tensor] = {}
    handles = []
    for path, mixer in mixers(model):
        handles.append(
            mixer.pre_proj.register_forward_hook(lambda m, a, out, path=path: tokens.__setitem__(path, out.detach()))
        )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: influence(mixer, tokens[path]) for path, mixer in mixers(model)}


def influence(mixer: Mixer, tokens: Tensor) -> Tensor:
    """Map ``(B, N, N)`` of one replacement, for tokens ``(B, N, C)`` after its pre-projection."""
    tokens = tokens.detach().requires_grad_(True)
    with torch.enable_grad():
        sums = torch.stack([s.sum(-1) for s in mixer.outputs(tokens)])
        if mixer.apart:  # gradients do not mix: one pass for all heads
            sums = sums.sum(0, keepdim=True)
        rows = [
            [torch.autograd.grad(head[:, n].sum(), tokens, retain_graph=True)[0].abs().sum(-1) for head in sums]
            for n in range(tokens.shape[1])
        ]
    found = torch.stack([torch.stack(heads).sum(0) for heads in rows], 1)
    return found / found.sum(-1, keepdim=True).clamp(min=1e-12)


def similarity(a: Tensor, b: Tensor) -> float:
    """Mean cosine similarity of the rows of two maps ``(B, N, N)``, in [0, 1] since they are not negative."""
    return float(torch.cosine_similarity(a, b, dim=-1).mean())


def draw_relations(path: Path, columns: dict[str, dict[str, Tensor]], scores: dict[str, dict[str, float]]) -> None:
    """Draw maps of the first image: a row an attention, a column a model.

    Args:
        path: PNG to write.
        columns: title -> path of the attention -> ``(B, N, N)``; the first one is the teacher.
        scores: title -> path of the attention -> similarity to the teacher.
    """
    import matplotlib.pyplot as plt

    teacher = next(iter(columns.values()))
    figure, axes = plt.subplots(
        len(teacher),
        len(columns),
        squeeze=False,
        figsize=(2.6 * len(columns), 2.8 * len(teacher)),
        layout='constrained',
    )
    for row, name in enumerate(teacher):
        for column, (title, maps) in enumerate(columns.items()):
            axis = axes[row][column]
            shown = maps[name][0].cpu()
            axis.imshow((shown / shown.amax(-1, keepdim=True)).numpy(), cmap='magma', vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            score = scores.get(title, {}).get(name)
            lines = ([title] if row == 0 else []) + ([] if score is None else [f'similarity {score:.2f}'])
            axis.set_title('\n'.join(lines), fontsize=9)
        axes[row][0].set_ylabel(name, fontsize=7)
    figure.supxlabel('token that is read (0: class token)', fontsize=9)
    figure.supylabel('token that reads', fontsize=9)
    write_atomically(path, lambda p: figure.savefig(p, format='png', dpi=120))
    plt.close(figure)
