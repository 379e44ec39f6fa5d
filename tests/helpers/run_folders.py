"""Run folders, and what their models compute, that the tests of exports share."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import QUIET, finetune
from PIL import Image
from torch import Tensor

from snello.config import FinetuneConfig
from snello.files import save_tensors
from snello.inference import Predictor
from snello.models import Preprocessing, create_model
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved
from snello.vit import logits_of


def make_run(data: Path, out: Path, **settings: Any) -> Path:
    """A run of an epoch, full fine-tuning unless told otherwise."""
    small = {"method": "full", "weights": "none", "epochs": 1, "batch_size": 4, "workers": 0, "checkpoint_steps": 0}
    machine = {"device": "cpu", "precision": "fp32", "attention": "fused", "compare": False}
    finetune(FinetuneConfig(data=data, out=out, **{**small, **machine, **settings}), QUIET)
    return out


def write_run(path: Path, model: str, image_size: int | None = None, num_classes: int = 3) -> dict[str, Tensor]:
    """A run folder of a timm model with random weights, which are returned."""
    config = FinetuneConfig(model=model, image_size=image_size, device="cpu", precision="fp32")
    pre = Preprocessing(image_size or 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.75)
    classes = tuple(f"class {i}" for i in range(num_classes))
    run = RunFolder(path)
    run.create(config, Resolved(classes=classes, preprocessing=pre))
    run.release()
    state = create_model(model, "none", num_classes, image_size).state_dict()
    save_tensors(path / "model.safetensors", state)
    return state


def edit(run: Path, changes: dict[str, Any], **settings: Any) -> None:
    """Changes what was resolved, and settings."""
    file = run / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["resolved"] |= changes
    file.write_text(yaml.safe_dump(values | settings))


def make_transformers(path: Path, kind: str = "ViT", **shape: Any) -> Path:
    """A tiny model of transformers in a folder, with an image processor that resizes to 24 and crops 16."""
    import transformers

    small = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**small, **shape)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 24}, "do_center_crop": True}
    processor |= {"crop_size": 16, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def picture(folder: Path) -> Path:
    """A photo-like picture whose sides are not alike, nor even."""
    values = np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    path = folder / "picture.jpg"
    Image.fromarray(values).resize((371, 243), Image.Resampling.BICUBIC).save(path)
    return path


@torch.no_grad()
def expected(run: Path, images: Path | Tensor) -> Tensor:
    """The logits that the run's own model and preprocessing give of a picture, or of prepared ones."""
    predictor = Predictor(run, "cpu")
    if isinstance(images, Path):
        images = predictor.normalize(predictor.transform(Image.open(images))[None])
    return logits_of(predictor.model(images))


def random_images(size: int, num: int = 2) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def blocks_of(card: Path) -> list[str]:
    """The Python code of a card."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.S)
