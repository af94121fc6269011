"""The comparison on small images: what it reads, that its runs repeat, and what it reports."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.cifar.__main__ import read
from bench.cifar.arms import ARMS, Arm
from bench.cifar.data import Images, batches, load, prepare
from bench.cifar.page import BEYOND, KEPT, PAGE, renewed
from bench.cifar.show import draw
from bench.cifar.tables import COLUMNS, best_rate, finals, markdown, rates_of, rows_of
from bench.cifar.train import Setting, train, trained
from gpd_fx.io.models import save_weights


def test_images_are_read_and_kept(tmp_path: Path) -> None:
    pixels = {
        f"x/{part}/{label}/{n}.png": np.random.default_rng(n).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        for part, count in (("train", 3), ("test", 2))
        for label in ("cat", "dog")
        for n in range(count)
    }
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, image in pixels.items():
            content = io.BytesIO()
            Image.fromarray(image).save(content, "png")
            archive.writestr(name, content.getvalue())
    for _ in range(2):  # the second time from what was kept
        learnt, tests = load(tmp_path / "images.zip", tmp_path / "cache" / "images.npz")
        assert learnt.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert len(tests) == 4
        assert np.array_equal(learnt.pixels[4].permute(1, 2, 0).numpy(), pixels["x/train/dog/1.png"])
        (tmp_path / "images.zip").unlink(missing_ok=True)


def test_batches_move_and_mirror() -> None:
    images = Images(torch.randint(0, 255, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(9))
    found = {
        int(label): x
        for xs, labels in batches(images, 3, torch.Generator())
        for x, label in zip(xs, labels, strict=True)
    }
    assert sorted(found) == list(range(9))
    for label, x in found.items():
        source = images.pixels[label]
        frame = torch.nn.functional.pad(source, (4,) * 4)
        windows = [f[:, r : r + 8, c : c + 8] for f in (frame, frame.flip(-1)) for r in range(9) for c in range(9)]
        assert any(torch.equal(x, prepare(window[None])[0]) for window in windows)


@pytest.mark.parametrize(
    "arm", [ARMS["alone"], Arm("", 1.5, static="dkd", start="trained"), Arm("", 2.0, None, shared=False)]
)
def test_a_run_repeats(arm: Arm, tmp_path: Path) -> None:
    setting = Setting(width=2, epochs=1, batch=8, half=False, folder=tmp_path)
    torch.manual_seed(1)
    save_weights(setting.student(), trained(setting, 3))
    save_weights(setting.static(), tmp_path / "static.safetensors")
    images = Images(torch.randint(0, 255, (24, 3, 32, 32), dtype=torch.uint8), torch.arange(24) % 10)
    first, student = train(arm, 0.05, 3, setting, images, images)
    second, again = train(arm, 0.05, 3, setting, images, images)
    assert first.student == second.student
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert first.folded == first.student[-1]
    torch.manual_seed(3)
    start = setting.student()
    if arm.start == "trained":
        start.load_state_dict(load_file(trained(setting, 3)))
    assert not torch.equal(start.head.weight, student.state_dict()["head.weight"])
    assert bool(first.teacher) == (arm.ratio is not None)
    assert type(student) is type(setting.student())


def record(arm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    same = {"rate": 0.1, "tuning": False, "student": [accuracy], "folded": accuracy, "seconds": 10.0, "teacher": []}
    return {"arm": arm, "seed": seed, "wall": 36.0, **same, **more}


def test_the_table_compares_seed_by_seed(tmp_path: Path) -> None:
    records = [record("alone", n, 70.0 + n) for n in range(3)]
    records += [record("gpd", n, 72.0 + n, seconds=25.0, teacher=[75.0]) for n in reversed(range(3))]
    records += [record("longer", n, 80.0) for n in range(2)] + [record("finetune", n, 79.0 + 2 * n) for n in range(2)]
    records += [record("gpd", 0, 99.0, tuning=True, rate=0.4), record("gpd", 0, 98.0, tuning=True, rate=0.2)]
    records.append({"arm": "gpd", "seed": 0, "rate": 0.8, "tuning": True, "student": [], "error": "the loss is nan"})
    text = markdown(COLUMNS, rows_of(records))
    assert "| student alone | 0.1 | 3 | 71.00 ± 1.00 |  |  |  |  |  | 10 s, 1.00x |" in text
    ours = "| 73.00 ± 1.00 | +2.00 ± 0.00 | student alone | 3 of 3 | 75.00 ± 0.00 | +2.00 ± 1.00 | 25 s, 2.50x |"
    assert f"| GPD, no static teacher | 0.1 | 3 {ours}" in text
    assert "| +0.00 ± 1.41 | trained again, alone | 1 of 2 |" in text
    assert rates_of(records) == (["arm", "0.2", "0.4", "0.8"], [[ARMS["gpd"].title, "98.00", "99.00", "diverged"]])
    assert best_rate(records, "gpd") == 0.4
    with pytest.raises(SystemExit, match="alone diverged at every learning rate"):
        best_rate([{**records[-1], "arm": "alone"}], "alone")
    draw(records, list(ARMS), tmp_path / "curves.svg")
    assert ARMS["longer"].title in (tmp_path / "curves.svg").read_text()


def test_rates_are_chosen_by_the_mean_of_their_runs() -> None:
    records = [record("gpd", n, held, tuning=True, rate=0.4) for n, held in ((1000, 72.0), (1001, 70.0))]
    records += [record("gpd", n, held, tuning=True, rate=0.8) for n, held in ((1000, 73.0), (1001, 68.0))]
    records += [record("gpd", 0, 60.0, rate=0.8), record("gpd", 1, 62.0, rate=0.4), record("gpd", 0, 61.0, rate=0.4)]
    assert best_rate(records, "gpd") == 0.4
    assert best_rate([r for r in records if r["seed"] != 1001], "gpd") == 0.8
    assert [r["folded"] for r in finals(records, "gpd")] == [61.0, 62.0]
    assert rates_of(records)[1] == [[ARMS["gpd"].title, "71.00 (2 runs)", "70.50 (2 runs)"]]
    one_diverged = record("gpd", 1002, 0.0, tuning=True, rate=0.4, student=[])
    assert best_rate([*records, one_diverged], "gpd") == 0.8


def test_the_page_holds_what_the_runs_gave() -> None:
    page, records = PAGE.read_text(encoding="utf-8"), read(KEPT)
    assert renewed(page, records, read(BEYOND)) == page
    assert all(len({r["rate"] for r in finals(records, name)}) <= 1 for name in ARMS)
    more = renewed(page, [record("gpd-strong", 0, 99.0), record("gpd-4", 0, 98.0)])
    assert "| GPD, weight 3 | 0.1 | 1 | 99.00 |" in more
    assert "cifar-ablation.svg" in more
    assert "cifar.svg" not in more
    with pytest.raises(SystemExit, match="has no line"):
        renewed("nothing", records)
