"""Models of torchvision and timm against ours: sizes, initialization; same weights, same Hessian blocks.

Those of Transformers are in test_models.py.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockhess
from blockhess.cli.main import main
from blockhess.models import ResNet, ResNetConfig
from blockhess_paper.models import VGG, VGGConfig, ViT, ViTConfig, named
from blockhess_paper.networks.networks import network
from tests.helpers.dense_hessian import assert_close, operator, operator_blocks


def their_name(name: str) -> str:
    """The name in torchvision and timm of a tensor of our ResNet18, VGG or ViT."""
    name = re.sub(r"^layers\.(\d+)", lambda found: f"layer{int(found[1]) // 2 + 1}.{int(found[1]) % 2}", name)
    return name.replace(".shortcut.", ".downsample.")


def loaded(package: str) -> ModuleType:
    """The package; skips the test where it is not installed, or is built for another torch."""
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{package} does not load beside torch {torch.__version__}: {error}")


@pytest.fixture(autouse=True)
def math_attention() -> Iterator[None]:
    """The one attention of torch that has a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


FULL = {
    "torchvision:resnet18": lambda: ResNet(),
    "torchvision:vgg16": lambda: VGG(),
    "torchvision:vgg16_bn": lambda: VGG(VGGConfig(batch_norm=True)),
    "timm:vit_base_patch16_224": lambda: ViT(),
}


@pytest.mark.parametrize("name", FULL)
def test_parameters_have_the_same_names_and_shapes(name: str) -> None:
    loaded(name.split(":")[0])
    with torch.device("meta"):
        ours, theirs = FULL[name](), named(name)
    shapes = {their_name(key): tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def small_resnet() -> tuple[nn.Module, nn.Module]:
    return ResNet(ResNetConfig(num_classes=3)), named("torchvision:resnet18", num_classes=3)


def small_vgg(batch_norm: bool) -> tuple[nn.Module, nn.Module]:
    """The convolutions of VGG16; the linear layers, whose width torchvision fixes, cut to 8."""
    with torch.device("meta"):
        theirs = named("torchvision:vgg16_bn" if batch_norm else "torchvision:vgg16")
    theirs.classifier[0] = nn.Linear(512 * 7 * 7, 8)
    theirs.classifier[3] = nn.Linear(8, 8)
    theirs.classifier[6] = nn.Linear(8, 3)
    return VGG(VGGConfig(hidden=8, num_classes=3, batch_norm=batch_norm)), theirs


def small_vit() -> tuple[nn.Module, nn.Module]:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    ours = ViT(ViTConfig(8, 4, depth=2, num_heads=2, width=8, num_classes=3))
    return ours, named("timm:vit_base_patch16_224", **sizes)


SMALL: Mapping[str, tuple[str, Callable[[], tuple[nn.Module, nn.Module]], int]] = {
    "resnet18": ("torchvision", small_resnet, 33),
    "vgg16": ("torchvision", lambda: small_vgg(False), 32),
    "vgg16_bn": ("torchvision", lambda: small_vgg(True), 32),
    "vit": ("timm", small_vit, 8),
}


def same_weights(name: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Ours, theirs with our weights and statistics, both in float64 and eval mode, and images."""
    package, make, side = SMALL[name]
    loaded(package)
    torch.manual_seed(0)
    ours, theirs = make()
    ours = ours.double().eval()
    for key, parameter in ours.named_parameters():  # away from zero biases and unit gains, which would hide a mistake
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 0.7 * key.endswith("weight"), 0.3)
        else:
            nn.init.normal_(parameter, std=math.sqrt(2 / parameter[0].numel()))
    state = {their_name(key): tensor for key, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state, assign=True)
    return ours, theirs.eval(), (torch.randn(3, 3, side, side, dtype=torch.float64), torch.tensor([0, 2, 1]))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("name", "training"), [("resnet18", False), ("resnet18", True), ("vgg16", False), ("vgg16_bn", True)]
)
def test_products_with_torchvisions_hessian_blocks_are_ours(name: str, training: bool) -> None:
    ours, theirs, batch = same_weights(name)
    if training:  # dropout off all the same
        for model in (ours, theirs):
            for module in model.modules():
                module.train(isinstance(module, nn.BatchNorm2d))
    assert_close(loss(theirs, batch).detach(), loss(ours, batch).detach())
    parameters = dict(ours.named_parameters())
    small = [key for key, p in parameters.items() if p.numel() < 40_000]
    chosen = small[:: len(small) // 5]
    here = operator(ours, batch, loss, {key: key for key in chosen})
    there = operator(theirs, batch, loss, {key: their_name(key) for key in chosen})
    v = torch.randn(1, sum(here.dims), dtype=torch.float64)
    mine, other = here(v).split(here.dims, 1), there(v).split(here.dims, 1)
    assert len(chosen) >= 5 and all(block.abs().max() > 1e-9 for block in mine)
    for a, b in zip(mine, other):
        assert_close(b, a)
    # And another direction is seen to give another product.
    assert (there(v.roll(1, 1)).split(here.dims, 1)[0] - mine[0]).abs().max() > 1e-6 * mine[0].abs().max()


def test_timms_hessian_blocks_are_ours() -> None:
    ours, theirs, batch = same_weights("vit")
    assert_close(loss(theirs, batch).detach(), loss(ours, batch).detach())
    names = ["cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.proj.weight",
             "blocks.1.mlp.fc2.bias", "head.weight"]  # fmt: skip
    blocks = {key: key for key in names}
    here = operator_blocks(operator(ours, batch, loss, blocks))
    there = operator_blocks(operator(theirs, batch, loss, blocks))
    for key in names:
        assert here[key].abs().max() > 1e-9
        assert_close(there[key], here[key])


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_spectra_are_ours(name: str) -> None:
    ours, theirs, batch = same_weights(name)
    name_of = {"resnet18": "layers.0.conv1.weight", "vit": "blocks.0.attn.qkv.weight"}[name]
    found = [
        blockhess.spectrum(
            model, batch, nn.CrossEntropyLoss(), blocks={"block": key}, num_probes=1, num_steps=6, batchnorm="batch"
        )
        for model, key in ((ours, name_of), (theirs, their_name(name_of)))
    ]
    nodes = [spectra.quadrature.nodes for spectra in found]
    assert_close(nodes[1], nodes[0], 1e6)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_base_patch16_224"])
def test_initialization_is_theirs(name: str) -> None:
    loaded(name.split(":")[0])
    torch.manual_seed(0)
    if name.startswith("timm"):
        ours: nn.Module = ViT(ViTConfig(32, 8, depth=2, num_heads=4, width=64))
        theirs = named(name, img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
    else:
        ours, theirs = ResNet(), named(name)
    other = dict(theirs.named_parameters())
    for key, mine in ours.named_parameters():
        tensor = other[their_name(key)]
        if mine.ndim > 1 and mine.numel() > 1000:
            tolerance = 10 / math.sqrt(2 * mine.numel())
            assert tensor.std().item() == pytest.approx(mine.std().item(), rel=tolerance), key
            assert abs(tensor.mean().item()) < 10 * mine.std().item() / math.sqrt(mine.numel()), key
        elif mine.std() == 0:
            assert torch.equal(tensor, mine), key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:vit_base_patch16_244", r"one of timm.list_models\(\), got .*the nearest are .*vit_base_patch16_224"),
        ("torchvision:resnet19", "got 'resnet19'; the nearest are .*resnet18"),
        ("torchvision:fcos_resnet50_fpn", "torchvision:NAME must be one of"),  # whose backbone would be downloaded
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    loaded(name.split(":")[0])
    with pytest.raises(ValueError, match=message):
        named(name)


def test_images_have_the_size_that_the_model_takes() -> None:
    loaded("timm")
    net = network("timm:test_vit", size=2)
    assert net.data[0].shape == (2, 3, 160, 160) and net.model(net.data[0]).shape[0] == 2
    assert network("torchvision:squeezenet1_1", size=2).data[0].shape == (2, 3, 224, 224)


def test_another_packages_model_takes_the_networks_place(tmp_path: Path) -> None:
    loaded("timm")
    assert main(["paper", "fig4", "--quick", "--model", "timm:test_vit", "--out", str(tmp_path)]) == 0
    assert list((tmp_path / "spectra").glob("*.npz"))
