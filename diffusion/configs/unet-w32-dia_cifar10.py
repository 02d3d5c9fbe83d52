# python diffusion/train.py diffusion/configs/unet-w32-dia_cifar10.py --data /data/cifar10-train.zip
# unet-w32_cifar10.py with one DIA-LSTM along each stage: depends on the input; folds by calibration.
_base_ = './unet-w32_cifar10.py'

plug = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))
