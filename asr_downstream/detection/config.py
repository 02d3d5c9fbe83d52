"""MMDetection configs: read, pointed at data, and turned into the config of the stock model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope

from asr_downstream.detection.data.fit import fit_to_data
from asr_downstream.detection.data.loading import name_files
from asr_downstream.errors import AsrError, DataError, FoldError
from asr_downstream.files.configs import override, read_config
from asr_downstream.plugging.learning.choose import ALL, words_of
from asr_downstream.registry import ATTENTIONS, PLUGS, find

__all__ = ['REMOVED', 'load_config', 'partly_stock_config', 'set_data_root', 'stock_config']

SCOPE = 'asr_downstream.'
# Top-level keys that a stock config drops: those of one training and its machines, of the card, and `HELPER`.
LAUNCH = (
    'card', 'fold_eval', 'launcher', 'learns', 'load_from', 'model_wrapper_cfg', 'norm_statistics', 'resume',
    'work_dir',
)  # fmt: skip
# Key that a file of det_configs/_base_/plugs leaves at the top level; a config takes it as ``plug=_base_.plug``.
HELPER = 'plug'
# Argument that goes with a ``plug`` where the rest of the model does not learn: sites in frozen stages are plugged too.
FROZEN_TOO = 'plug_frozen'

# Top-level key: paths of attention blocks of the detector that were removed after it was trained.
REMOVED = 'removed_attention'
# Arguments that models of this package take besides those of their stock classes.
OWN = ('plug', FROZEN_TOO, 'replace', 'distil')
OWN_HOOKS = ('GatesHook',)  # hooks of this package that stand in the place of none of MMEngine's


def load_config(
    path: Path, data_root: Path | None = None, options: dict[str, Any] | None = None, needs_data: bool = True
) -> Config:
    """Read a config and point it at the data.

    Args:
        path: config file.
        data_root: folder of the data set, to which the config is made to fit, see
            `asr_downstream.detection.data.fit.fit_to_data`. Without it, a relative ``data/NAME/`` of the config is
            looked up under the environment variable ``ASR_DATA_ROOT``, if that is set and the folder is not there.
        options: overrides, ``{'train_cfg.max_epochs': 3}``.
        needs_data: whether ``ASR_DATA_ROOT`` is looked at.

    Raises:
        AsrError: the file is missing or is no config, or it has a ``plug`` that no part of its model takes.
    """
    path = Path(path)
    config = read_config(path, 'det_configs/')
    if 'model' not in config:
        raise AsrError(f'{path}: has no "model"; expected an MMDetection config')
    helper = config.pop(HELPER, None)
    override(config, options, path)
    if HELPER in config:
        raise AsrError(f'{path}: --cfg-options {HELPER}...: name the part of the model, such as model.backbone.plug')
    if helper is not None and not has_plug(config.model):
        raise AsrError(
            f'{path}: its plug stands beside the model, and no part of the model takes it; write '
            f"model=dict(backbone=dict(type='{SCOPE}ResNet', plug=_base_.plug))"
        )
    init_default_scope(config.get('default_scope', 'mmdet'))
    name_files(config)
    if words_of(config.get('learns', ALL)) != (ALL,):
        plug_frozen(config.model)
    shared = os.environ.get('ASR_DATA_ROOT')
    own = config.get('data_root', '/')
    if needs_data and data_root is None and shared and not os.path.isabs(own) and not Path(own).is_dir():
        data_root = Path(shared) / Path(config.data_root).name
    if data_root is not None:
        set_data_root(config, data_root)
        if said := fit_to_data(config, Path(data_root)):
            print(f'{path.name} fitted to {data_root}: {said}')
    return config


def has_plug(node: Any) -> bool:
    """Whether a model's config, or a part of it, names a ``plug``."""
    if isinstance(node, dict):
        return 'plug' in node or any(map(has_plug, node.values()))
    return isinstance(node, list | tuple) and any(map(has_plug, node))


def plug_frozen(node: Any) -> None:
    """Let the plugs of a model's config take sites in frozen stages as well, in place."""
    if isinstance(node, dict):
        if node.get('plug') is not None:
            node[FROZEN_TOO] = True
        for value in node.values():
            plug_frozen(value)
    elif isinstance(node, list | tuple):
        for value in node:
            plug_frozen(value)


def set_data_root(config: Config, root: Path) -> None:
    """Replace the config's ``data_root`` wherever its data loaders and evaluators have it, in place.

    Raises:
        DataError: ``root`` is no folder, or the config has no ``data_root`` to replace.
    """
    if not root.is_dir():
        raise DataError(f'{root}: no such data folder; give the folder that holds annotations/ with --data-root')
    old = config.get('data_root')
    if not old:
        raise DataError(f'{config.filename}: has no top-level data_root, so --data-root cannot be applied')
    new = f'{root}/'

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: replaced(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(replaced, value))
        return new + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value

    parts = {
        key: replaced(value)
        for key, value in config.to_dict().items()
        if key.endswith(('_dataloader', '_evaluator')) and value
    }
    for key, value in parts.items():
        config[key] = value
    config.data_root = new


def stock_config(config: Config) -> Config:
    """Return a copy that names nothing of this package: its types become those they extend, `OWN` is dropped."""
    stock = copy.deepcopy(config)
    for key in (*LAUNCH, HELPER):
        stock.pop(key, None)

    def strip(node: Any) -> None:
        if isinstance(node, dict):
            kind = node.get('type')
            if isinstance(kind, str) and kind.startswith(SCOPE):
                node['type'] = kind.removeprefix(SCOPE)
                drop_own(node)
            elif isinstance(kind, type) and hasattr(kind, 'stock_class'):
                node['type'] = kind.stock_class
                drop_own(node)
            for value in node.values():
                strip(value)
        elif isinstance(node, list | tuple):
            for value in node:
                strip(value)

    strip(stock._cfg_dict)
    hooks = [hook for hook in stock.get('custom_hooks') or [] if not is_own(hook)]
    if stock.get('custom_hooks') and not hooks:
        stock.pop('custom_hooks')
    elif hooks:
        stock.custom_hooks = hooks
    imports = stock.get('custom_imports')
    if imports:
        imports.imports = [name for name in imports.imports if name not in plugin_modules()]
        if not imports.imports:
            stock.pop('custom_imports')
    return stock


def is_own(hook: Any) -> bool:
    """Whether a hook of a config is of this package alone."""
    return isinstance(hook, dict) and hook.get('type') in OWN_HOOKS


def drop_own(node: dict[str, Any]) -> None:
    """Take out of a model's config what its stock class does not take, in place."""
    for key in OWN:
        node.pop(key, None)


def partly_stock_config(config: Config, kept: Sequence[str]) -> Config:
    """Return a copy whose plugs are only at the sites ``kept``, given by their paths in the detector.

    Raises:
        FoldError: a plug shares by a list of groups, whose names depend on all of them.
    """
    partly = copy.deepcopy(config)
    partly.pop(HELPER, None)

    def narrow(node: Any, path: str) -> None:
        if isinstance(node, list | tuple):
            for index, value in enumerate(node):
                narrow(value, f'{path}.{index}')
        if not isinstance(node, dict):
            return
        if str(node.get('type')).startswith(SCOPE) and 'plug' in node:
            prefix = f'{path}.' if path else ''
            own = [site.removeprefix(prefix) for site in kept if site.startswith(prefix)]
            specs = [node['plug']] if isinstance(node['plug'], dict) else list(node['plug'])
            specs = [spec for spec in (narrowed(dict(s), own) for s in specs) if spec]
            if specs:
                node['plug'] = specs
            else:
                node['type'] = node['type'].removeprefix(SCOPE)
                node.pop('plug')
                node.pop(FROZEN_TOO, None)
        for key, value in node.items():
            narrow(value, f'{path}.{key}' if path else key)

    narrow(partly.model, '')
    return partly


def narrowed(spec: dict[str, Any], sites: list[str]) -> dict[str, Any] | None:
    """Return a plug spec for those of ``sites`` that are its own, or None without any or for constant gates."""
    if isinstance(spec.get('share'), list | tuple):
        raise FoldError(
            f'share={spec["share"]!r}: what a budget keeps of listed groups has no config of its own; use '
            f"share='stage' or 'width', or fold without a budget"
        )
    attention = spec.get('attention')  # a Start has none
    uses_input = attention is not None and getattr(find(ATTENTIONS, attention['type']), 'uses_input', True)
    constant = spec['type'] == 'ASR' or not uses_input
    patterns = spec.get('sites', 'residual')
    own = [
        site
        for site in sites
        if (isinstance(patterns, str) or any(fnmatchcase(site, p) for p in patterns))
        and not any(fnmatchcase(site, p) for p in spec.get('skip', ()))
    ]
    if constant or not own:
        return None
    return {**{key: value for key, value in spec.items() if key != 'skip'}, 'sites': own}


def plugin_modules() -> set[str]:
    """Modules in which users have registered attentions and plugs: a stock model has no need of them."""
    registered = (*ATTENTIONS.module_dict.values(), *PLUGS.module_dict.values())
    return {cls.__module__ for cls in registered}


def model_of(config: Config) -> Any:
    """The model's config without pretrained weights to fetch: a checkpoint is about to replace them."""
    model = copy.deepcopy(config.model)
    model.pop('init_cfg', None)
    if 'backbone' in model:
        model.backbone.init_cfg = None
    return model
