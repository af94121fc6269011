"""Models by name, and their weights in safetensors files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from gpd_fx.demo.digits import DigitNet
from gpd_fx.errors import ArgumentError, CheckpointError
from gpd_fx.io.models import load_weights, resolve, save_weights

HERE = "not_a_number = 3\ndef text():\n    return 'x'\ndef broken():\n    raise KeyError('inside')\n"


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_models.py").write_text(
        f"from torch import nn\nready = nn.ReLU()\nclass Group:\n    net = nn.Tanh\n{HERE}"
    )
    (tmp_path / "user_broken.py").write_text("import does_not_exist_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_models"


def test_a_factory_a_class_an_attribute_and_a_module(user_module: str) -> None:
    assert isinstance(resolve("gpd_fx.demo.digits:DigitNet"), DigitNet)
    assert isinstance(resolve(f"{user_module}:Group.net"), nn.Tanh)
    assert isinstance(resolve(f"{user_module}:ready"), nn.ReLU)


def test_options_follow_the_name() -> None:
    assert resolve("gpd_fx.demo.digits:DigitNet,width=7").get_parameter("stem.weight").shape[0] == 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "not of the form torchvision:NAME"),
        ("torchvision", "did you mean torchvision:NAME"),
        (":x", "not of the form"),
        ("hub:resnet18", "importing 'hub' failed with ModuleNotFoundError"),
        ("gpd_fx.demo.digits:DigitNets", "gpd_fx.demo.digits has no 'DigitNets'; close to it: DigitNet"),
        ("user_models:text", "returned a str, not a torch.nn.Module"),
        ("user_models:broken", "building it failed with KeyError: 'inside'"),
        ("gpd_fx.demo.digits:DigitNet,width", "'width' is no option; write NAME=VALUE"),
        ("gpd_fx.demo.digits:DigitNet,height=3", "building it failed with TypeError"),
        ("timm:resnet18,pretrained=true", "'pretrained' would download"),
        ("user_models:not_a_number", "names a int"),
        ("user_broken:x", "No module named 'does_not_exist_at_all'"),
    ],
)
@pytest.mark.usefixtures("user_module")
def test_bad_names_say_what_is_wrong(spec: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve(spec)
    assert message in str(caught.value)
    assert spec in str(caught.value)


@pytest.mark.zoo
def test_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("it downloads"))
    assert type(resolve("torchvision:resnet18")).__name__ == "ResNet"
    assert type(resolve("torchvision:lraspp_mobilenet_v3_large")).__name__ == "LRASPP"  # its backbone is not fetched
    with pytest.raises(ArgumentError, match=r"no model 'resnet19' \(close to it: resnet1"):
        resolve("torchvision:resnet19")


@pytest.mark.zoo
def test_timm() -> None:
    pytest.importorskip("timm")
    assert type(resolve("timm:resnet10t")).__name__ == "ResNet"
    for name in ("hf-hub:someone/model", "local-dir:/tmp"):
        with pytest.raises(ArgumentError, match="timm has no model"):
            resolve(f"timm:{name}")
    with pytest.raises(ArgumentError, match=r"close to it: .*resnet26d"):
        resolve("timm:resnet26dd")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ArgumentError, match=r"gpd_fx\[zoo\]"):
        resolve("timm:resnet18")


def test_weights_round_trip_with_tied_and_strided_tensors(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        layer, tied = nn.Linear(3, 3), nn.Linear(3, 3)
        layer.bias = nn.Parameter(torch.randn(3, 2)[:, 0])
        tied.weight = layer.weight
        return nn.Sequential(layer, tied, nn.BatchNorm1d(3))

    first, second = make(), make()
    save_weights(first, tmp_path / "weights.safetensors")
    load_weights(second, tmp_path / "weights.safetensors")
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_bad_weight_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(nn.Linear(2, 2), path)
    path.write_bytes(b"\x80\x04 a pickle, perhaps")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(nn.Linear(2, 2), path)
    save_weights(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"does not fit the model(.|\n)*size mismatch"):
        load_weights(nn.Linear(3, 2), path)
    with pytest.raises(ArgumentError, match="does not exist"):
        save_weights(nn.Linear(2, 2), tmp_path / "nowhere" / "weights.safetensors")
