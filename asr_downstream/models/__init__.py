"""Small reference networks for benchmarks, tests and examples."""

from asr_downstream.models.resnet_cifar import resnet56, resnet164

__all__ = ['resnet56', 'resnet164']
