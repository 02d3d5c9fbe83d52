# python diffusion/train.py diffusion/configs/unet-w32-asr-se_digits.py
# unet-w32_digits.py with ASR(SE) at every residual block; folds into it.
# python tools/fold.py work_dirs/unet-w32-asr-se_digits shipped/digits
_base_ = './unet-w32_digits.py'

plug = dict(type='ASR', attention=dict(type='SE', reduction=4))
