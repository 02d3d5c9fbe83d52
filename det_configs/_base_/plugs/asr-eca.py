# ASR over ECA: learned inputs, so that the gates are constant; folds exactly into the stock detector.
plug = dict(type='ASR', attention=dict(type='ECA', kernel_size=3))
