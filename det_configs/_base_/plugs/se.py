# SE, one at each site: depends on the input, so it folds by calibration only (tools/fold.py --calibrate).
plug = dict(type='Attention', attention=dict(type='SE', reduction=16))
