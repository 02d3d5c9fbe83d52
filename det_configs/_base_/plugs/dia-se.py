# DIA-SE: one SE shared along each stage; depends on the input, so it folds by calibration only
# (tools/fold.py --calibrate).
plug = dict(type='DIA', attention=dict(type='SE', reduction=16))
