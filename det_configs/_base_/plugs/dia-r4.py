# DIA for narrow backbones: one LSTM along each stage, r = 4 as for CIFAR; depends on the input, so it folds by
# calibration only (tools/fold.py --calibrate).
plug = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))
