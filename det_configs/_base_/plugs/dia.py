# DIA: one LSTM along each stage, r = 20 as for ImageNet; depends on the input, so it folds by calibration only
# (tools/fold.py --calibrate).
plug = dict(type='DIA', attention=dict(type='DIALSTM', reduction=20))
