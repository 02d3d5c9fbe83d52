"""Gates under FSDP1, whose shards are views into a flat parameter: the gradients of two processes are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from asr_downstream import plug

SPECS: dict[str, Any] = {
    'ASR(SE)': dict(type='ASR', attention=dict(type='SE', reduction=4), shift=True),
    'ASR(IE)': dict(type='ASR', attention=dict(type='IE')),
    'LayerScale': dict(type='Attention', attention=dict(type='LayerScale', init_value=0.5)),
}


class Branch(nn.Module):
    """A residual branch of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def gated(spec: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Branch(), Branch())
    plug(model, dict(spec, sites=['*.second']))
    return model


def inputs() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def shard(rank: int, file: str, out: str, whole: bool) -> None:
    """One step of each spec on the same data on both processes; the first writes the gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    found = {}
    for name, spec in SPECS.items():
        model = FullyShardedDataParallel(
            gated(spec), auto_wrap_policy=ModuleWrapPolicy({Branch}), use_orig_params=whole,
            device_id=torch.device('cpu'),
        )  # fmt: skip
        y = model(inputs())
        y.square().sum().backward()
        found[name] = {'y': y.detach()}
        if whole:
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                found[name] |= {
                    key.replace('_fsdp_wrapped_module.', ''): p.grad.clone() for key, p in model.named_parameters()
                }
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('whole', [True, False], ids=['use_orig_params', 'flat'])
def test_two_processes_of_fsdp1_have_the_gradients_of_one(whole: bool, tmp_path: Path) -> None:
    mp.start_processes(
        shard, (str(tmp_path / 'rendezvous'), str(tmp_path / 'out.pth'), whole), nprocs=2, start_method='spawn'
    )
    found = torch.load(tmp_path / 'out.pth', weights_only=True)
    for name, spec in SPECS.items():
        model = gated(spec)
        y = model(inputs())
        y.square().sum().backward()
        torch.testing.assert_close(found[name]['y'], y.detach())
        if whole:
            for key, p in model.named_parameters():
                torch.testing.assert_close(found[name][key].reshape(p.shape), p.grad, msg=f'{name}: {key}')
