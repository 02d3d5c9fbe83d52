# python diffusion/train.py diffusion/configs/unet-w32-adapt_cifar10.py --data /data/one-class --learns gates
#     --cfg-options model.pretrained_model_name_or_path=SHIPPED
# Adapts a UNet that unet-w32_cifar10.py has trained, and fold has shipped, to other images: one free scale a channel at
# every norm and convolution, which starts from 1 and folds into them.
_base_ = './unet-w32_cifar10.py'

model = dict(
    _delete_=True, type='UNet2DModel', pretrained_model_name_or_path='work_dirs/shipped', low_cpu_mem_usage=False
)
plug = dict(type='Attention', attention=dict(type='LayerScale', init_value=1.0), sites=['*norm*', '*conv*'])
learns = 'gates'
max_train_steps = 600
learning_rate = 1e-2
lr_warmup_steps = 50
checkpointing_steps = 300
validation_steps = 300
