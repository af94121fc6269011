"""The configuration of a run: its defaults, its file, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gpd_fx.distill.config import DistillConfig, load_config, read_values
from gpd_fx.errors import ArgumentError

pytest.importorskip("yaml")


def test_defaults_are_the_methods() -> None:
    config = DistillConfig("torchvision:resnet18").complete()
    assert (config.ratio, config.epochs, config.batch_size) == (2.0, 100, 512)
    assert (config.optimizer, config.learning_rate, config.momentum, config.weight_decay) == (
        "momentum",
        0.1,
        0.9,
        1e-4,
    )
    assert config.schedule == "multistep"
    assert (config.ema_decay, config.temperature, config.smoothing, config.static_loss) == (0.99996, 1.0, 0.1, "dkd")
    assert config.weights == {"task_student": 1, "task_teacher": 1, "distill": 1, "static": 1, "features": 1}
    assert (config.mixup, config.cutmix, config.warmup_epochs) == (0.0, 0.0, 0)


def test_fine_tuning_is_shorter_and_slower() -> None:
    config = DistillConfig("torchvision:resnet18", student_weights="weights.safetensors").complete()
    assert (config.epochs, config.learning_rate) == (50, 0.01)


def test_transformers_have_a_recipe_of_their_own() -> None:
    config = DistillConfig("timm:deit_tiny_patch16_224", recipe="transformer", batch_size=1024, mixup=0.2).complete()
    assert (config.optimizer, config.learning_rate, config.epochs, config.warmup_epochs) == ("adamw", 1e-3, 300, 5)
    assert (config.schedule, config.schedule_options, config.mixup, config.cutmix) == ("cosine", {}, 0.2, 1.0)


def test_a_file_gives_the_same_configuration(tmp_path: Path) -> None:
    config = DistillConfig(
        "m:f",
        ratio={"a.*": 1.5, "*": 2.0},
        branches=None,
        weights={"distill": {0.0: 0.0, 2.5: 3.0}},
        learning_rate=1e-5,
        input_size=[3, 8, 8],
        features=[["layer1", "layer1"]],
        static_teacher="x:y",
        transforms={"scale": [0.5, 1.0]},
    ).complete()
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config == config.complete()


def test_yaml_takes_1e_4_for_text_but_a_number_is_meant(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("student: m:f\nweight_decay: 1e-4\ndataset: 1e-4x\n")
    assert load_config(tmp_path / "c.yaml").weight_decay == 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"epochs": 1.5}, "epochs is 1.5; it must be a whole number or nothing"),
        ({"epochs": True}, "epochs is True"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number or nothing"),
        ({"static_loss": "mse"}, "static_loss is 'mse'; it must be 'dkd' or 'kd'"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"exclude": "head.*"}, "exclude is 'head.*'; it must be a list, each text"),
        ({"weights": {"distil": 1.0}}, "unknown weight 'distil'; did you mean distill?"),
        ({"weights": {"distill": -1.0}}, "weights.distill"),
        ({"input_size": [224]}, "channels, height, width"),
        ({"features": [["a"]]}, "each entry is a pair"),
        ({"features": [["a", "b"], ["c", "b"]]}, "features names ('b', 'b') on one side"),
        ({"static_weights": "w"}, "name it (static_teacher)"),
        ({"mixup": 0.5, "batch_size": 7}, "batch_size 7 must be even"),
        ({"epoch": 3}, "unknown option 'epoch'; did you mean epochs?"),
        ({"student": ""}, "no student is named"),
    ],
)
def test_bad_values_name_themselves(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        DistillConfig.from_dict({"student": "m:f", **values})
    assert message in str(caught.value)


def test_files_that_are_no_configurations(tmp_path: Path) -> None:
    for content in ("- a\n", "a: [\n", "1: 2\n"):
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(ArgumentError, match=r"c\.yaml"):
            read_values(tmp_path / "c.yaml")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_values(tmp_path / "missing.yaml")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(ArgumentError, match=r"needs yaml.*pip install 'gpd_fx\[train\]'"):
        DistillConfig("m:f").save(tmp_path / "c.yaml")
