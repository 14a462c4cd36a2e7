"""The encoder: a torchvision ResNet without its last layer, its initial weights, encoder.pt."""

import functools
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import resnet

from core.options import option
from training.checkpoints import save_file

ARCHS = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
}
# kernel size, stride and padding of the first convolution; whether torchvision's max-pool follows
STEMS = {
    "imagenet": (7, 2, 3, True),
    "stl": (3, 1, 1, True),
    "cifar": (3, 1, 1, False),
    "small": (3, 2, 1, False),
}


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that applies only its center tap to maps of 1x1 pixels.

    The other taps see only zero padding there.  This is faster (32-pixel images behind the ImageNet
    stem end in such maps) and avoids a bug: in bfloat16 on CPUs, torch 2.10 to 2.14 read
    uninitialized memory for the weight gradient of a strided convolution of such a map.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        shape = layer.in_channels, layer.out_channels, 3, layer.stride, 1
        super().__init__(*shape, bias=False, device="meta")  # draws no random numbers
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 1):
            return nn.functional.conv2d(x, self.weight[:, :, 1:2, 1:2])
        return super().forward(x)


class Encoder(resnet.ResNet):
    """torchvision's ResNet (v1) without its last layer: (B, 3, H, W) -> (B, feature_size).

    Parameter names and initialization are torchvision's.  `width` multiplies all channel counts;
    `zero_init` starts the last batch-norm scale of each block at 0.
    """

    def __init__(self, arch="resnet18", stem="imagenet", width=1.0, zero_init=False) -> None:
        block, layers = ARCHS[arch]
        self.channels = max(1, round(64 * width))
        super().__init__(block, layers, zero_init_residual=zero_init)
        kernel, stride, padding, pool = STEMS[stem]
        self.conv1 = nn.Conv2d(3, self.channels, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(self.channels)
        if not pool:
            self.maxpool = nn.Identity()
        self.feature_size = 8 * self.channels * block.expansion
        self.fc = nn.Identity()
        for module in list(self.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                    setattr(module, name, Conv3x3(layer))

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        # torchvision calls this with 64, 128, 256 and 512 planes; `width` scales them.
        if planes == 64:
            self.inplanes = self.channels
        return super()._make_layer(block, planes * self.channels // 64, blocks, stride, dilate)


# name -> function of stem, width and zero_init that returns an encoder.  To add a network, add a
# line: any nn.Module that maps (B, 3, H, W) to (B, feature_size) and has that size as attribute.
ENCODERS = {arch: functools.partial(Encoder, arch) for arch in ARCHS}


@dataclass
class ShapeConfig:
    """[encoder]: architecture of the encoder."""

    arch: str = option("resnet18", "network", choices=ENCODERS)
    stem: str = option(
        "imagenet",
        "first layers: imagenet 7x7/2 and max-pool, stl 3x3 and max-pool, cifar 3x3, small 3x3/2",
        choices=STEMS,
    )
    width: float = option(1.0, "multiplies all channel counts", low=1 / 16, high=8)


@dataclass
class NewEncoderConfig(ShapeConfig):
    """[encoder]: architecture and random initialization of the encoder."""

    zero_init: bool = option(False, "start each block's last batch-norm scale at 0, not 1")


@dataclass
class EncoderConfig(NewEncoderConfig):
    """[encoder]: architecture and initial weights of the encoder."""

    init: str = option("random", "initial weights: random, imagenet, or a file of weights")


def build_encoder(config: EncoderConfig) -> nn.Module:
    """The encoder that `config` describes, with random weights."""
    return ENCODERS[config.arch](config.stem, config.width, config.zero_init)


def initialize(config: EncoderConfig, images) -> tuple[nn.Module, list[float], list[float]]:
    """The encoder with the weights of --init, and the mean and std that normalize its inputs.

    images   training images, whose mean and std are used unless the weights come with theirs
    """
    if config.init == "random":
        return build_encoder(config), *images.statistics()
    from training.weights import initial_weights  # not for random weights

    weights = initial_weights(config)
    return weights.encoder(config, f"--init {config.init}"), *weights.normalization(images)


def fetch(config: EncoderConfig) -> None:
    """Download the published weights that --init names, if missing."""
    if config.init == "imagenet":
        from training.weights import imagenet_file  # not for random weights

        imagenet_file(config)


def save_encoder(path: Path, encoder: nn.Module, meta: dict) -> None:
    """Write an encoder.pt: {"state_dict": torchvision's names, "meta": shape, inputs, run}."""
    save_file(path, {"state_dict": portable(encoder), "meta": meta})


def portable(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict on the CPU, in torch's default memory format."""
    return {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
