# PYTHONPATH=tools python diffusion/train.py tools/bench/unet-w32-lora_cifar10.py --data /data/one-class
#     --cfg-options model.base=SHIPPED
# What unet-w32-adapt_cifar10.py does with gates, with LoRA of peft (pip install -c constraints.txt peft), to compare.
_base_ = '../../diffusion/configs/unet-w32-adapt_cifar10.py'

custom_imports = dict(imports=['bench.lora'])
model = dict(_delete_=True, type='LoRAUNet2DModel', base='work_dirs/shipped', rank=4)
plug = None
learns = 'all'  # what LoRA has left to learn
learning_rate = 1e-3
