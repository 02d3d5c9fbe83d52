# ASR over DIA for narrow backbones: learned inputs through one LSTM a stage, r = 4 as for CIFAR; constant gates, which
# fold exactly into the stock detector.
plug = dict(type='ASR', attention=dict(type='DIALSTM', reduction=4))
