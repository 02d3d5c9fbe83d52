"""Adapters of peft and LyCORIS: scales of channels are converted, everything else is refused by its name.

The files are made here as the libraries write them; what they compute is written down beside each.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from helpers.adapters import differing
from safetensors.torch import save_file
from torch import Tensor, nn

from asr_downstream import CheckpointError, apply_gates, verify
from asr_downstream.folding.adapters.foreign.convert import convert_gates


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 6)
        self.up_proj = nn.Linear(6, 6)
        self.value = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.conv(x).tanh()))
        return self.value(self.up_proj(x.mean((2, 3))).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid_block = Block()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid_block(x))


X = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net() -> Net:
    return randomise(Net().double()).eval()  # type: ignore[return-value]


def peft(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """What ``save_pretrained`` of peft writes."""
    folder.mkdir(exist_ok=True)
    given = {'peft_type': 'IA3', 'feedforward_modules': [], 'fan_in_fan_out': False, **config}
    (folder / 'adapter_config.json').write_text(json.dumps(given))
    save_file(
        {f'base_model.model.{k}': v.contiguous() for k, v in tensors.items()}, folder / 'adapter_model.safetensors'
    )
    return folder


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


@torch.no_grad()
def test_ia3_of_peft(tmp_path: Path) -> None:
    """Outputs are scaled with their bias; of feed-forward layers the inputs are, in groups too."""
    base = net()
    at = 'mid_block.'
    tensors = {
        f'{at}value.ia3_l': scales(5, 1),
        f'{at}up_proj.ia3_l': scales(1, 6),
        f'{at}conv.ia3_l': scales(1, 6, 1, 1),
        f'{at}grouped.ia3_l': scales(1, 6, 1, 1),
        'head.weight': torch.randn(3, 5, dtype=torch.float64),  # modules_to_save
    }
    source = peft(tmp_path / 'ia3', tensors, feedforward_modules=['up_proj', 'grouped'])
    adapter = convert_gates(source, tmp_path / 'a.safetensors', base)
    assert {*adapter.heads} == {'head.weight'}
    assert 'IA3 of peft' in str(adapter)

    scaled = copy.deepcopy(base)
    block = scaled.mid_block
    block.value.register_forward_hook(lambda m, x, y: y * tensors[f'{at}value.ia3_l'].flatten())
    block.conv.register_forward_hook(lambda m, x, y: y * tensors[f'{at}conv.ia3_l'])
    block.up_proj.register_forward_pre_hook(lambda m, x: x[0] * tensors[f'{at}up_proj.ia3_l'])
    block.grouped.register_forward_pre_hook(lambda m, x: x[0] * tensors[f'{at}grouped.ia3_l'])
    scaled.head.weight.copy_(tensors['head.weight'])
    applied = apply_gates(base, tmp_path / 'a.safetensors')
    assert verify(applied, scaled, X).relative < 1e-10
    for number, name in enumerate(tensors):  # negative control: each of them counts
        others = {key: value for key, value in tensors.items() if key != name}
        source = peft(tmp_path / 'ia3', others, feedforward_modules=['up_proj', 'grouped'])
        convert_gates(source, tmp_path / f'{number}.safetensors', base)
        assert verify(apply_gates(base, tmp_path / f'{number}.safetensors'), scaled, X).relative > 1e-3
    wrong = convert_gates(
        peft(tmp_path / 'ia3', tensors, feedforward_modules=['up_proj']), tmp_path / 'b.safetensors', base
    )
    assert verify(apply_gates(base, wrong), scaled, X).relative > 1e-3


def test_a_base_without_a_model_and_a_regular_expression(tmp_path: Path) -> None:
    base = net()
    tensors = {'mid_block.grouped.ia3_l': scales(1, 6, 1, 1), 'mid_block.value.ia3_l': scales(5, 1)}
    source = peft(tmp_path / 'ia3', tensors, feedforward_modules=r'.*\.grouped')
    one = convert_gates(source, tmp_path / 'a.safetensors', base)
    two = convert_gates(source / 'adapter_model.safetensors', tmp_path / 'b.safetensors', base.state_dict(), 'Net')
    assert one.base == two.base
    assert two.sites['mid_block.grouped'].groups == 2
    assert differing(apply_gates(base, one), apply_gates(base, two)) == []
    assert one.sites['mid_block.grouped'].constants.inputs is not None


@torch.no_grad()
def test_ia3_and_norms_of_lycoris(tmp_path: Path) -> None:
    """IA3: the weight times 1 + w, of outputs or inputs; the bias stays. Norms: weight + w_norm, bias + b_norm."""
    base = net()
    own = {
        'conv': {'weight': torch.randn(1, 6, 1, 1), 'on_input': torch.tensor(0)},
        'up_proj': {'weight': torch.randn(6), 'on_input': torch.tensor(1)},
        'value': {'weight': torch.randn(5), 'on_input': torch.tensor(0)},
        'norm': {'w_norm': torch.randn(6), 'b_norm': torch.randn(6)},
    }
    wanted = copy.deepcopy(base)
    block = wanted.mid_block
    block.conv.weight.mul_(1 + own['conv']['weight'].double().view(6, 1, 1, 1))
    block.up_proj.weight.mul_(1 + own['up_proj']['weight'].double())
    block.value.weight.mul_(1 + own['value']['weight'].double()[:, None])
    block.norm.weight.add_(own['norm']['w_norm'])
    block.norm.bias.add_(own['norm']['b_norm'])
    for prefix in ('lycoris', 'lora_unet'):
        path = tmp_path / f'{prefix}.safetensors'
        save_file({f'{prefix}_mid_block_{n}.{k}': v for n, more in own.items() for k, v in more.items()}, path)
        adapter = convert_gates(path, tmp_path / 'a.safetensors', base)
        assert adapter.sites.keys() == {f'mid_block.{name}' for name in own}
        applied = apply_gates(base, tmp_path / 'a.safetensors')
        assert verify(applied, wanted, X).relative < 1e-10
        for name, value in wanted.state_dict().items():
            assert torch.allclose(applied.state_dict()[name], value, rtol=1e-12, atol=1e-12), name
        assert verify(applied, base, X).relative > 1e-3


LORA = {'mid_block.value.lora_A.weight': torch.randn(2, 6), 'mid_block.value.lora_B.weight': torch.randn(5, 2)}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    'LoRA of peft': (LORA, {'peft_type': 'LORA'}, "is 'LORA' of peft, and only IA3"),
    'LoRA without a config': (LORA, None, 'is LoRA, and no scale of channels'),
    'LoRA in an IA3': (LORA, {}, 'is LoRA, and no scale of channels'),
    'Conv1D': ({'head.ia3_l': scales(3, 1)}, {'fan_in_fan_out': True}, 'fan_in_fan_out=True'),
    'no config': ({'head.ia3_l': scales(3, 1)}, None, 'adapter_config.json: cannot be read'),
    'feedforward': ({'head.ia3_l': scales(3, 1)}, {'feedforward_modules': 3}, 'is no list of names'),
    'layer': ({'other.ia3_l': scales(3, 1)}, {}, 'other: is in the adapter, and the base has no such layer'),
    'outputs': ({'head.ia3_l': scales(4, 1)}, {}, 'head: has 4 scales in the adapter, and the layer a 3 outputs'),
    'inputs': ({'head.ia3_l': scales(1, 4)}, {}, r'head: has 4 scales .* weight of shape \(3, 5\)'),
    'norm': ({'mid_block.norm.ia3_l': scales(1, 6)}, {}, 'mid_block.norm: .* normalises its inputs'),
    'infinite': ({'head.ia3_l': torch.full((3, 1), torch.inf)}, {}, 'head: its scales are not finite'),
    'saved module': (
        {'head.ia3_l': scales(3, 1), 'pooler.weight': torch.randn(2)},
        {},
        "'pooler': 'pooler.weight' is not known",
    ),
}


@pytest.mark.parametrize(('tensors', 'config', 'message'), REFUSED.values(), ids=REFUSED)
def test_what_is_no_scale_of_channels_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, message: str
) -> None:
    source = peft(tmp_path / 'x', tensors, **(config or {}))
    if config is None:
        (source / 'adapter_config.json').unlink()
    with pytest.raises(CheckpointError, match=message):
        convert_gates(source, tmp_path / 'a.safetensors', net())
    assert not (tmp_path / 'a.safetensors').exists()


AT = 'lycoris_mid_block_value'
LYCORIS: dict[str, tuple[dict[str, Tensor], str]] = {
    'LoCon': (
        {f'{AT}.lora_up.weight': torch.randn(5, 2), f'{AT}.alpha': torch.tensor(1.0)},
        "'lora_up.weight' is LoRA",
    ),
    'LoKr': ({f'{AT}.lokr_w1': torch.randn(2, 2), f'{AT}.alpha': torch.tensor(1.0)}, "'lokr_w1' is LoKr"),
    'LoHa': ({f'{AT}.hada_w1_a': torch.randn(2, 2)}, "'hada_w1_a' is LoHa"),
    'full': ({f'{AT}.diff': torch.randn(5, 6)}, "'diff' is full weights"),
    'OFT': ({f'{AT}.oft_blocks': torch.randn(5, 6)}, "'oft_blocks' is OFT"),
    'GLoRA': ({f'{AT}.a1.weight': torch.randn(5, 6)}, "'a1.weight' is GLoRA"),
    'IA3 and LoKr': (
        {f'{AT}.weight': torch.randn(5), f'{AT}.on_input': torch.tensor(0), 'lycoris_head.lokr_w1': torch.randn(2, 2)},
        "'lycoris_head': 'lokr_w1' is LoKr",
    ),
    'text encoder': (
        {'lora_te_x.weight': torch.randn(5), 'lora_te_x.on_input': torch.tensor(0)},
        "'lora_te_x' is none of the layers of this base",
    ),
    'cut off': ({f'{AT}.on_input': torch.tensor(0)}, 'its IA3 has no weight'),
    'norm of another width': ({'lycoris_mid_block_norm.w_norm': torch.randn(5)}, 'has 5 numbers in the adapter'),
    'norm without a bias': (
        {'lycoris_mid_block_value.w_norm': torch.zeros(5, 6), 'lycoris_mid_block_value.b_norm': torch.zeros(5)},
        'has a bias in the adapter, and another or none in the base',
    ),
}


@pytest.mark.parametrize(('tensors', 'message'), LYCORIS.values(), ids=LYCORIS)
def test_other_modules_of_lycoris_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / 'x.safetensors')
    with pytest.raises(CheckpointError, match=message):
        convert_gates(tmp_path / 'x.safetensors', tmp_path / 'a.safetensors', net())


def test_nothing_is_a_multiple_of_0(tmp_path: Path) -> None:
    base = net()
    base.mid_block.norm.weight.data[2] = 0
    more = torch.randn(6)
    save_file({'lycoris_mid_block_norm.w_norm': more}, tmp_path / 'x.safetensors')
    with pytest.raises(CheckpointError, match='weights of the base are 0'):
        convert_gates(tmp_path / 'x.safetensors', tmp_path / 'a.safetensors', base)
    more[2] = 0
    save_file({'lycoris_mid_block_norm.w_norm': more}, tmp_path / 'x.safetensors')
    convert_gates(tmp_path / 'x.safetensors', tmp_path / 'a.safetensors', base)
    applied = apply_gates(base, tmp_path / 'a.safetensors').mid_block.norm
    assert torch.allclose(applied.weight, base.mid_block.norm.weight + more, rtol=1e-12, atol=0)
    assert torch.allclose(applied.bias, base.mid_block.norm.bias, rtol=1e-12, atol=1e-15)


def test_two_layers_of_one_name_are_refused(tmp_path: Path) -> None:
    base = nn.ModuleDict({'a_b': nn.Linear(2, 2), 'a': nn.ModuleDict({'b': nn.Linear(2, 2)})})
    save_file(
        {'lycoris_a_b.weight': torch.zeros(2), 'lycoris_a_b.on_input': torch.tensor(0)}, tmp_path / 'x.safetensors'
    )
    with pytest.raises(CheckpointError, match='LyCORIS has one name for both, lycoris_a_b'):
        convert_gates(tmp_path / 'x.safetensors', tmp_path / 'a.safetensors', base)
