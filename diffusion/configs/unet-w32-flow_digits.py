# python diffusion/train.py diffusion/configs/unet-w32-flow_digits.py
# unet-w32_digits.py by flow matching: sampled by Euler, few steps are enough.
_base_ = './unet-w32_digits.py'

noise_scheduler = dict(_delete_=True, type='FlowMatchEulerDiscreteScheduler', num_train_timesteps=1000)
num_inference_steps = 25
