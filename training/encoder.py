"""The encoder: a torchvision network without its last layer, its initial weights, encoder.pt."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import resnet

from core.errors import UserError
from core.options import flag_of, option, options_of
from training.checkpoints import save_file

# block, blocks of each stage; torchvision's groups and width_per_group, if not 1 and 64
ARCHS = {
    "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": (resnet.Bottleneck, [3, 8, 36, 3]),
    "resnext50_32x4d": (resnet.Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x8d": (resnet.Bottleneck, [3, 4, 23, 3], 32, 8),
    "resnext101_64x4d": (resnet.Bottleneck, [3, 4, 23, 3], 64, 4),
    "wide_resnet50_2": (resnet.Bottleneck, [3, 4, 6, 3], 1, 128),
    "wide_resnet101_2": (resnet.Bottleneck, [3, 4, 23, 3], 1, 128),
}
# torchvision's other classifiers; the SqueezeNets end in a convolution
OTHERS = [n for n in models.list_models(models, exclude="squeezenet*") if n not in ARCHS]
# networks for one image size, by the first word of their names -> arguments that set the size
IMAGE_SIZE = {"vit": lambda n: {"image_size": n}, "maxvit": lambda n: {"input_size": (n, n)}}
# their auxiliary classifiers are left out; their published weights take inputs in -1 .. 1
AUXILIARY = ("googlenet", "inception_v3")
# kernel size, stride and padding of the first convolution; whether torchvision's max-pool follows
STEMS = {
    "imagenet": (7, 2, 3, True),
    "stl": (3, 1, 1, True),
    "cifar": (3, 1, 1, False),
    "small": (3, 2, 1, False),
}


class CenterTapConv2d(nn.Conv2d):
    """A convolution that applies only its center tap to maps of 1x1 pixels.

    The other taps see only zero padding there.  This is faster (32-pixel images behind the ImageNet
    stem end in such maps) and avoids a bug: in bfloat16 on CPUs, torch 2.10 to 2.14 read
    uninitialized memory for the weight gradient of a strided or large convolution of such a map.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        shape = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
        more = dict(padding=layer.padding, groups=layer.groups, bias=False)
        super().__init__(*shape, **more, device="meta")  # draws no random numbers
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 1):
            row, column = self.padding
            center = self.weight[:, :, row : row + 1, column : column + 1]
            return nn.functional.conv2d(x, center, self.bias, groups=self.groups)
        return super().forward(x)


def use_center_taps(network: nn.Module) -> None:
    """Make each convolution of size k with padding (k - 1) / 2, k > 1, a CenterTapConv2d."""
    for module in list(network.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.dilation == (1, 1) and any(layer.padding):
                if layer.kernel_size == tuple(2 * p + 1 for p in layer.padding):
                    setattr(module, name, CenterTapConv2d(layer))


class Encoder(resnet.ResNet):
    """torchvision's ResNet without its last layer: (B, 3, H, W) -> (B, feature_size).

    Parameter names and initialization are torchvision's.  `width` multiplies all channel counts;
    `zero_init` starts the last batch-norm scale of each block at 0.
    """

    def __init__(self, arch="resnet18", stem="imagenet", width=1.0, zero_init=False) -> None:
        block, layers, *groups = ARCHS[arch]
        self.channels = max(1, round(64 * width))
        if groups and self.channels * groups[1] < 64:  # a group would have no channel
            raise UserError(f"--width {width:g}: --arch {arch} needs {1 / groups[1]:g} or more")
        super().__init__(block, layers, 1000, zero_init, *groups)
        kernel, stride, padding, pool = STEMS[stem]
        self.conv1 = nn.Conv2d(3, self.channels, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(self.channels)
        if not pool:
            self.maxpool = nn.Identity()
        self.feature_size = 8 * self.channels * block.expansion
        self.fc = nn.Identity()
        use_center_taps(self)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        # torchvision calls this with 64, 128, 256 and 512 planes; `width` scales them.
        if planes == 64:
            self.inplanes = self.channels
        return super()._make_layer(block, planes * self.channels // 64, blocks, stride, dilate)


def without_last_layer(arch: str, *resnet_options, image_size: int = 0) -> nn.Module:
    """One of OTHERS without its last layer; UserError if it refuses the image size."""
    options = dict(aux_logits=False, init_weights=True) if arch in AUXILIARY else {}
    if image_size:
        options = IMAGE_SIZE[arch.partition("_")[0]](image_size)
    try:
        network = models.get_model(arch, weights=None, **options)
    except (AssertionError, ValueError) as error:  # how torchvision refuses a size
        raise UserError(f"--image-size {image_size}: not for --arch {arch} ({error})") from None
    *_, (name, layer) = network.named_modules()
    network.set_submodule(name, nn.Identity())
    use_center_taps(network)
    for norm in batch_norms(network):
        norm.momentum = 0.1  # the ResNets'; 0.01 and 0.0003 of some would need thousands of steps
    network.arch, network.feature_size = arch, layer.in_features
    return network


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


# name -> function of stem, width and zero_init that returns an encoder; OTHERS ignore the three.
# To add a network, add a line: an encoder is any nn.Module that maps (B, 3, H, W) to
# (B, feature_size) and has that size as attribute.
ENCODERS = {arch: functools.partial(Encoder, arch) for arch in ARCHS}
ENCODERS |= {arch: functools.partial(without_last_layer, arch) for arch in OTHERS}


@dataclass
class ShapeConfig:
    """[encoder]: architecture of the encoder."""

    arch: str = option("resnet18", "classifier of torchvision, such as vit_b_16", choices=ENCODERS)
    stem: str = option(
        "imagenet",
        "first layers: imagenet 7x7/2 and max-pool, stl 3x3 and max-pool, cifar 3x3, small 3x3/2",
        choices=STEMS,
    )
    width: float = option(1.0, "multiplies all channel counts", low=1 / 16, high=8)
    image_size: int = option(0, "vit, maxvit: side of the images (0: torchvision's default)", low=0)

    def check(self, table: str) -> None:
        """UserError for an option that the network does not have."""
        absent = ["stem", "width", "zero_init"] if self.arch in OTHERS else []
        if self.arch.partition("_")[0] not in IMAGE_SIZE:
            absent.append("image_size")
        for name in absent:
            value, default = (getattr(x, name, None) for x in (self, type(self)))
            if value != default:
                raise UserError(f"--arch {self.arch} needs {flag_of(name)} {default}, not {value}")

    def check_crop(self, crop_size: int) -> None:
        """UserError if the network takes only images of another size."""
        side = self.image_size or 224
        if self.arch.partition("_")[0] in IMAGE_SIZE and crop_size != side:
            text = f"takes images of {side} pixels; add --crop-size {side} or --image-size"
            raise UserError(f"--arch {self.arch}: {text} {crop_size}")

    @property
    def shape(self) -> dict:
        """The options that determine names and shapes of the weights, for a file's metadata."""
        return {name: getattr(self, name) for name in options_of(ShapeConfig)}

    def __str__(self) -> str:
        stem = f", stem {self.stem}, width {self.width:g}" if self.arch not in OTHERS else ""
        return self.arch + stem


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
    more = {"image_size": config.image_size} if config.image_size else {}
    return ENCODERS[config.arch](config.stem, config.width, config.zero_init, **more)


def check_sizes(encoder: nn.Module, transform, sides=()) -> None:
    """UserError if the encoder can't take images of `sides` (pixels) or of the transform's side.

    Only OTHERS are checked, on the meta device: no arithmetic, no random numbers, no change.
    """
    if getattr(encoder, "arch", "") not in OTHERS:
        return
    state = {name: value.to("meta") for name, value in encoder.state_dict().items()}
    for side in (*sides, transform.crop or transform.stored):
        flag = "--crop-size" if side in sides else "--eval-size"
        try:
            torch.func.functional_call(encoder, state, torch.zeros(2, 3, side, side, device="meta"))
        except Exception as error:  # torch and torchvision raise many types
            text = f"can't take images of {side} pixels ({' '.join(str(error).split())})"
            raise UserError(f"--arch {encoder.arch}: {text}; change {flag}") from None


@torch.no_grad()
def measure_statistics(encoder: nn.Module, inputs: Tensor) -> None:
    """Set the running statistics of one of OTHERS to those of `inputs` (B, 3, H, W).

    With those that a new network has, mean 0 and variance 1, the outputs of many are 0 in eval
    mode: 1e-10 for mobilenet_v3_small.
    """
    norms = batch_norms(encoder)
    if getattr(encoder, "arch", "") not in OTHERS or len(inputs) < 2 or not norms:
        return
    encoder.eval()  # no dropout
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    encoder(inputs)
    for norm in norms:
        norm.momentum = 0.1
    encoder.train()


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
    """Download the published weights that --init names, if missing; UserError for a bad file."""
    if config.init != "random":
        from training.weights import initial_weights  # not for random weights

        initial_weights(config).encoder(config, f"--init {config.init}")


def save_encoder(path: Path, encoder: nn.Module, meta: dict) -> None:
    """Write an encoder.pt: {"state_dict": torchvision's names, "meta": shape, inputs, run}."""
    save_file(path, {"state_dict": portable(encoder), "meta": meta})


def portable(network: nn.Module) -> dict[str, Tensor]:
    """The network's state dict on the CPU, in torch's default memory format."""
    return {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
