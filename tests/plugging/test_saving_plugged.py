"""save_pretrained of plugged and replaced models: nothing lost, and nothing wrong loads with the plain libraries."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from conftest import randomise
from helpers.diffusion import conditional_unet
from helpers.far import dit, noisy, pixels, unet, vit
from safetensors.torch import load_file, save_file
from torch import nn

import asr_downstream
from asr_downstream import CheckpointError, PlugError, fold, plug
from asr_downstream.far import load_far, replace, save_far

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))
SE = dict(type='Attention', attention=dict(type='SE', reduction=4))
DIA = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))
FAR = dict(type='FAR', variant='M3', layers='all')
ENDS = dict(ASR, sites=['vit.layers.*.mlp.fc2'])


def conditional() -> dict[str, Any]:
    return {'sample': torch.randn(1, 4, 8, 8), 'timestep': torch.tensor([3]),
            'encoder_hidden_states': torch.randn(1, 5, 24)}  # fmt: skip


def tokens() -> dict[str, Any]:
    return noisy(4, 'hidden_states') | {'class_labels': torch.tensor([0, 4])}


CASES = {
    'UNet2DModel': (unet, ASR, noisy),
    'UNet2DModel, ASR and SE': (unet, [ASR, SE], noisy),
    'UNet2DModel, DIA': (unet, DIA, noisy),
    'UNet2DConditionModel': (conditional_unet, dict(ASR, preserve=True), conditional),
    'UNet2DModel, shift and inputs': (unet, [dict(ASR, shift=True), dict(ASR, side='input', preserve=True)], noisy),
    'DiT': (dit, dict(ASR, skip=['*.0.attn1.*']), tokens),
    'ViT': (vit, dict(ASR, sites=['vit.layers.*.mlp.*']), pixels),
    'DeiT': (lambda: vit('DeiT'), dict(ASR, sites=['*mlp*.fc?']), pixels),
}


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def plugged(build: Any, spec: Any) -> nn.Module:
    model = build()
    plug(model, spec)
    return randomise(model).eval()


def save(model: Any, folder: Path, **kwargs: Any) -> str:
    """Save, and return the one warning that this gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        model.save_pretrained(folder, **kwargs)
    ours = [str(w.message) for w in seen if 'load_plugged' in str(w.message)]
    assert len(ours) == 1
    return ours[0]


@pytest.mark.parametrize(('build', 'spec', 'inputs'), CASES.values(), ids=CASES)
def test_what_was_saved_plugged_is_loaded_plugged_and_not_by_the_library(
    build: Any, spec: Any, inputs: Any, tmp_path: Path
) -> None:
    model, given = plugged(build, spec), inputs()
    kind = type(model)
    message = save(model, tmp_path)
    assert 'fold' in message
    assert str(tmp_path) in message
    with pytest.raises((OSError, ValueError), match=r'(?i)no file|not found|does not appear|weights'):
        kind.from_pretrained(tmp_path, local_files_only=True)
    again = asr_downstream.load_plugged(tmp_path)
    assert type(again) is kind
    assert not again.training
    assert torch.equal(output(again, given), output(model, given))
    assert list(again.state_dict()) == list(model.state_dict())


def test_folded_models_save_as_stock_and_leave_nothing_behind(tmp_path: Path) -> None:
    model, given = plugged(unet, ASR), noisy()
    folded = fold(pickle.loads(pickle.dumps(copy.deepcopy(model))))[0]
    assert vars(folded).keys() == vars(unet()).keys()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        folded.save_pretrained(tmp_path)  # type: ignore[operator]
    stock = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(stock, given), output(folded, given))
    assert save(model, tmp_path / 'plugged')  # the one that was copied still knows that it is plugged


def test_copies_and_pickles_save_themselves(tmp_path: Path) -> None:
    model = plugged(unet, ASR)
    for number, change in enumerate((copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)))):
        other = change(model)
        randomise(other)
        save(other, tmp_path / str(number))
        assert torch.equal(output(asr_downstream.load_plugged(tmp_path / str(number)), noisy()), output(other, noisy()))


@pytest.mark.slow
def test_the_class_is_stock_and_compiles() -> None:
    model = plugged(unet, ASR)
    assert type(model) is diffusers.UNet2DModel
    compiled = torch.compile(model, backend='eager')
    assert torch.allclose(output(compiled, noisy()), output(model, noisy()))


def test_a_pipeline_with_a_plugged_unet(tmp_path: Path) -> None:
    model = plugged(unet, ASR)
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    message = save(pipeline, tmp_path)
    assert str(tmp_path / 'unet') in message
    with pytest.raises(OSError, match='no file named'):
        diffusers.DDPMPipeline.from_pretrained(tmp_path, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"load_plugged\('.*unet'\)"):
        asr_downstream.load_plugged(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path, unet=asr_downstream.load_plugged(tmp_path / 'unet'))
    assert torch.equal(output(again.unet, noisy()), output(model, noisy()))


def test_stock_weights_that_were_there_do_not_stay_beside_the_new_config(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    save(plugged(unet, ASR), tmp_path)
    with pytest.raises(OSError, match='no file named'):
        diffusers.UNet2DModel.from_pretrained(tmp_path, local_files_only=True)
    vit().save_pretrained(tmp_path / 'vit', max_shard_size='20KB')
    assert len(list((tmp_path / 'vit').glob('model-*.safetensors'))) > 1
    save(plugged(vit, ENDS), tmp_path / 'vit')
    with pytest.raises(OSError, match=r'no file|does not appear'):
        transformers.ViTForImageClassification.from_pretrained(tmp_path / 'vit', local_files_only=True)


def test_arguments_of_training_scripts(tmp_path: Path) -> None:
    model: Any = plugged(vit, ENDS)
    assert inspect.signature(model.save_pretrained) == inspect.signature(vit().save_pretrained)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / 'other', is_main_process=False)
    assert not (tmp_path / 'other').exists()
    state = {k: v * 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save(model, tmp_path, state_dict=state, safe_serialization=True, max_shard_size='1KB', variant='fp16')
    again = asr_downstream.load_plugged(str(tmp_path)).state_dict()
    assert all(torch.equal(again[k], state[k]) for k in state)
    assert 'not pushed' in save(model, tmp_path, push_to_hub=True)


def test_half_precision_and_tied_weights_stay_as_they_are(tmp_path: Path) -> None:
    model = plugged(unet, ASR)
    save(nn.Module.to(model, torch.bfloat16), tmp_path)
    again = asr_downstream.load_plugged(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, max_position_embeddings=8)  # fmt: skip
    bert = plugged(lambda: transformers.BertForMaskedLM(config), dict(ASR, sites=['*.intermediate.dense']))
    save(bert, tmp_path / 'bert')
    loaded = asr_downstream.load_plugged(tmp_path / 'bert')
    ids = {'input_ids': torch.arange(6)[None]}
    assert torch.equal(output(loaded, ids), output(bert, ids))
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_what_a_partial_fold_keeps_is_saved(tmp_path: Path) -> None:
    model = plugged(unet, [ASR, dict(SE, sites=['*down_blocks*conv2'])])
    kept, _ = fold(model, dynamic='keep')
    save(kept, tmp_path)
    again = asr_downstream.load_plugged(tmp_path)
    assert torch.equal(output(again, noisy()), output(kept, noisy()))
    assert len(asr_downstream.describe(again).sites) == 2


def test_groups_of_shared_attentions_that_a_partial_fold_has_emptied_are_no_obstacle(tmp_path: Path) -> None:
    groups = ['down_blocks.0', 'down_blocks.1', 'mid_block', 'up_blocks.0', 'up_blocks.1']
    spec = dict(type='DIA', attention=dict(type='SE', reduction=4), sites=['*resnets*.conv2'])
    model = plugged(unet, dict(spec, share=[[f'{group}.*'] for group in groups]))
    data = [noisy(), noisy()]
    change = fold(model, calibrate=data)[1].calibration.change
    emptied = 0
    for number, part in enumerate((0.9, 0.5, 0.2)):
        kept, report = fold(model, calibrate=data, max_drop=part * change)
        left = report.calibration.kept
        emptied += any(not any(path.startswith(group) for path in left) for group in groups)
        kept.save_pretrained(tmp_path / str(number))
        again = asr_downstream.load_plugged(tmp_path / str(number))
        assert torch.equal(output(again, noisy()), output(kept, noisy()))
        assert {row.path for row in asr_downstream.describe(again).sites} == set(left)
    assert emptied, 'else nothing was tested'


def test_settings_of_generation_are_those_that_were_saved(tmp_path: Path) -> None:
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    model = plugged(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), dict(ASR, sites=['*.down_proj'])
    )
    model.generation_config.update(max_new_tokens=3, repetition_penalty=2.0, eos_token_id=[5, 7])
    save(model, tmp_path)
    again = asr_downstream.load_plugged(tmp_path)
    assert again.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()


def test_sites_that_were_left_out_as_frozen_stay_out(tmp_path: Path) -> None:
    model = unet()
    model.down_blocks[0].requires_grad_(False)
    with pytest.warns(UserWarning, match='frozen'):
        plug(model, ASR)
    plug(model, dict(ASR, sites=['down_blocks.0.resnets.0.conv1', 'conv_out'], preserve=True))
    randomise(model).eval()
    save(model, tmp_path)
    assert torch.equal(output(asr_downstream.load_plugged(tmp_path), noisy()), output(model, noisy()))


def test_replaced_models_and_replaced_models_with_gates(tmp_path: Path) -> None:
    for number, (build, inputs) in enumerate(((vit, pixels), (unet, noisy))):
        model = build()
        replace(model, FAR)
        randomise(model).eval()
        message = save(model, tmp_path / str(number))
        assert 'replaced attention' in message
        with pytest.raises(OSError, match=r'no file|does not appear'):
            type(model).from_pretrained(tmp_path / str(number), local_files_only=True)
        again = asr_downstream.load_plugged(tmp_path / str(number))
        assert torch.equal(output(again, inputs()), output(model, inputs()))
    both = plugged(unet, ASR)
    replace(both, FAR)
    randomise(both)
    save(both, tmp_path / 'both')
    assert torch.equal(output(asr_downstream.load_plugged(tmp_path / 'both'), noisy()), output(both, noisy()))
    folded, _ = fold(both)
    save(folded, tmp_path / 'folded')
    again = asr_downstream.load_plugged(tmp_path / 'folded')
    assert torch.equal(output(again, noisy()), output(folded, noisy()))


def test_what_far_ships_is_not_loaded_by_the_library_and_has_a_card(tmp_path: Path) -> None:
    model: Any = vit()
    replace(model, FAR)
    folder = save_far(model.eval(), tmp_path / 'far', {'name': 'FAR-100'})
    with pytest.raises(OSError, match=r'no file|does not appear'):
        transformers.ViTForImageClassification.from_pretrained(folder, local_files_only=True)
    assert torch.equal(output(load_far(str(folder)), pixels()), output(model, pixels()))  # type: ignore[arg-type]
    card = (folder / 'README.md').read_text()
    assert 'library_name: asr_downstream' in card  # transformers alone cannot load it
    assert 'load_far' in card
    assert 'FAR-100' in card
    stock = save_far(vit(), tmp_path / 'stock')
    assert 'from_pretrained' in (stock / 'README.md').read_text()
    transformers.ViTForImageClassification.from_pretrained(stock, local_files_only=True)


def test_folders_of_before_still_load(tmp_path: Path) -> None:
    model: Any = vit()
    replace(model, FAR)
    folder = save_far(model.eval(), tmp_path / 'far')
    (folder / 'asr_downstream.safetensors').rename(folder / 'model.safetensors')
    facts = json.loads((folder / 'far.json').read_text())
    del facts['files']
    (folder / 'far.json').write_text(json.dumps(facts))
    assert torch.equal(output(load_far(folder), pixels()), output(model, pixels()))


def test_a_class_of_ones_own_is_given(tmp_path: Path) -> None:
    class Own(diffusers.ModelMixin, diffusers.ConfigMixin):
        @diffusers.configuration_utils.register_to_config
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.a = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    model = Own().eval()
    plug(model, dict(ASR, sites=['a']))
    save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r'has no .*Own.*model='):
        asr_downstream.load_plugged(tmp_path)
    x = torch.randn(2, 6)
    assert torch.equal(asr_downstream.load_plugged(tmp_path, model=Own())(x), model(x))


def not_finite(folder: Path) -> None:
    path = folder / 'asr_downstream.safetensors'
    state = load_file(path)
    state['conv_in.bias'][0] = float('nan')
    save_file(state, path)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / 'asr_downstream.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    'no folder': (lambda f: f.rename(f.with_name('x')), 'no such folder'),
    'no spec': (lambda f: (f / 'asr_downstream.json').unlink(), 'save_pretrained of a plugged'),
    'no weights': (lambda f: (f / 'asr_downstream.safetensors').unlink(), 'asr_downstream.safetensors'),
    'cut weights': (lambda f: (f / 'asr_downstream.safetensors').write_bytes(b'x' * 50), 'damaged'),
    'not finite': (not_finite, 'conv_in.bias'),
    'other weights': (lambda f: save_file({'a': torch.ones(1)}, f / 'asr_downstream.safetensors'), 'another model'),
    'text': (lambda f: (f / 'asr_downstream.json').write_text('{'), 'asr_downstream.json'),
    'list': (lambda f: (f / 'asr_downstream.json').write_text('[]'), 'asr_downstream.json'),
    'null plug': (lambda f: rewrite(f, plug=None), 'plug'),
    'wrong plug': (lambda f: rewrite(f, plug={'': [{'type': 'ASR', 'attention': {'type': 'SEE'}}]}), "'SEE'"),
    'library': (lambda f: rewrite(f, library='os'), "library 'os'"),
    'class': (lambda f: rewrite(f, **{'class': 'logging'}), "'logging'"),
    'path': (lambda f: rewrite(f, plug={'nowhere': [ASR]}), "'nowhere'"),
    'order': (lambda f: rewrite(f, order=['__class__']), "'__class__'"),
    'class 2': (lambda f: rewrite(f, **{'class': ['x']}), 'x'),
    'config': (lambda f: (f / 'config.json').write_text('{'), 'config'),
    'no config': (lambda f: (f / 'config.json').unlink(), 'config'),
    'format': (lambda f: rewrite(f, format=99), 'newer'),
}


@pytest.mark.parametrize(('damage', 'words'), DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders_are_one_line(damage: Any, words: str, tmp_path: Path) -> None:
    folder = tmp_path / 'f'
    save(plugged(unet, ASR), folder)
    damage(folder)
    with pytest.raises((CheckpointError, PlugError), match=words) as error:
        asr_downstream.load_plugged(folder)
    assert '\n' not in str(error.value)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / 'f').write_text('')
    with pytest.raises(asr_downstream.AsrError, match='f: is a file'):
        plugged(unet, ASR).save_pretrained(tmp_path / 'f')  # type: ignore[operator]


def test_the_weights_are_those_of_the_state_dict(tmp_path: Path) -> None:
    model = plugged(unet, ASR)
    save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'config.json', 'asr_downstream.json', 'asr_downstream.safetensors'}
    state = load_file(tmp_path / 'asr_downstream.safetensors')
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
