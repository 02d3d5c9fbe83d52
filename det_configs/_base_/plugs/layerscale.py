# LayerScale, the control: one free number a channel instead of an attention, started at 0.1 as in its paper up to
# depth 18; folds exactly into the stock detector.
plug = dict(type='Attention', attention=dict(type='LayerScale', init_value=0.1))
