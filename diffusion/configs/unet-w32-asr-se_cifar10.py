# python diffusion/train.py diffusion/configs/unet-w32-asr-se_cifar10.py --data /data/cifar10-train.zip
# unet-w32_cifar10.py with ASR(SE) at every residual block; folds into it.
_base_ = './unet-w32_cifar10.py'

plug = dict(type='ASR', attention=dict(type='SE', reduction=8))
