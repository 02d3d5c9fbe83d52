# LSTMs of which half read column by column.
#   python tools/distill_far.py tools/far_configs/vit-w64-cross_cifar10-16px.py --data /data/cifar10-train.zip
# First vit-w64_cifar10-16px.py, whose teacher this is.
_base_ = './vit-w64_cifar10-16px.py'
teacher = dict(
    _delete_=True,
    type='ViTForImageClassification',
    pretrained_model_name_or_path='work_dirs/far/vit-w64_cifar10-16px/shipped/teacher',
)
replace = dict(scan='cross')
stages = [
    dict(
        name='distill', learns='replacements', distance=dict(type='MSE', feature='heads'), epochs=6, warmup_epochs=0.5
    ),
    dict(name='finetune', learns='all', learning_rate=5e-4, epochs=3, warmup_epochs=0.2),
]
