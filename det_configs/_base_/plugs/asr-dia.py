# ASR over DIA: learned inputs through one LSTM a stage, r = 20 as for ImageNet; constant gates, which fold exactly
# into the stock detector.
plug = dict(type='ASR', attention=dict(type='DIALSTM', reduction=20))
