# LSTMs that learn from the logits of the teacher too, in both stages.
#   python tools/distill_far.py tools/far_configs/vit-w64-kl_cifar10-16px.py --data /data/cifar10-train.zip
# First vit-w64_cifar10-16px.py, whose teacher this is.
_base_ = './vit-w64_cifar10-16px.py'
teacher = dict(
    _delete_=True,
    type='ViTForImageClassification',
    pretrained_model_name_or_path='work_dirs/far/vit-w64_cifar10-16px/shipped/teacher',
)
stages = [
    dict(
        name='distill',
        learns='replacements',
        distance=[dict(type='MSE', feature='heads'), dict(type='KL', temperature=2.0)],
        epochs=6,
        warmup_epochs=0.5,
    ),
    dict(
        name='finetune',
        learns='all',
        distance=dict(type='KL', temperature=2.0),
        learning_rate=5e-4,
        epochs=3,
        warmup_epochs=0.2,
    ),
]
