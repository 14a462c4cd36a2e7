"""Other self-supervised methods, one file each, and the hidden layers of their heads."""

from torch import nn


def blocks(inputs: int, size: int, activation=nn.ReLU, bias: bool = True) -> list[nn.Module]:
    """Linear - BatchNorm - activation, twice: the hidden layers of a head."""
    layers = []
    for width in (inputs, size):
        layers += [nn.Linear(width, size, bias=bias), nn.BatchNorm1d(size), activation()]
    return layers
