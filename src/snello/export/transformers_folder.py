"""For transformers: a folder that `from_pretrained` loads.

A model of transformers is saved as itself, with an image processor that prepares pictures as the run did. A model of
timm is saved as timm's models are on the hub: transformers has a wrapper that loads these, and timm loads them too.
"""

import json
from pathlib import Path
from typing import Any

import torch

from snello.export import timm_file
from snello.export.trained import Trained
from snello.models.weights import FILE

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers, which image processors are saved with."""


def write(trained: Trained, folder: Path) -> None:
    """Writes weights, config.json and, for a model of transformers, preprocessor_config.json."""
    if trained.is_transformers:
        from snello.models.transformers_models import quiet  # timm's users may not have transformers

        model: Any = trained.build()
        model.config.id2label = dict(enumerate(trained.classes))
        model.config.label2id = {name: index for index, name in enumerate(trained.classes)}
        with quiet(offline=True):
            model.save_pretrained(folder)
        _write_json(folder / "preprocessor_config.json", image_processor(trained))
    else:
        timm_file.save_weights(trained, folder / FILE, {})
        _write_json(folder / "config.json", timm_config(trained))


def line(trained: Trained, path: str) -> str:
    """The line of Python that loads the folder with transformers."""
    model = f"transformers.AutoModelForImageClassification.from_pretrained({path!r}).eval()"
    return f"import {_imports(trained)}; model = {model}"


def code(trained: Trained, path: str) -> list[str]:
    """Lines of Python that classify a picture with transformers and, where that is possible, with timm."""
    own = "import snello  # registers the model with timm\n" if _imports(trained) != "transformers" else ""
    with_transformers = f"""{own}from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = {path!r}  # or the name on the hub
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForImageClassification.from_pretrained(folder).eval()
image = Image.open("picture.jpg").convert("RGB")
logits = model(**processor(image, return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax(1))])"""
    if trained.is_transformers:
        return [with_transformers]
    with_timm = f"""import {timm_file.imports(trained)}
from PIL import Image

model = timm.create_model({"local-dir:" + path!r}, pretrained=True).eval()  # or hf-hub: and the name on the hub
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("picture.jpg").convert("RGB")
logits = model(transform(image).unsqueeze(0))
print(model.pretrained_cfg["label_names"][int(logits.argmax(1))])"""
    return [with_transformers, with_timm]


def _imports(trained: Trained) -> str:
    return "transformers" if trained.is_transformers else timm_file.imports(trained, "transformers")


def image_processor(trained: Trained) -> dict[str, Any]:
    """The image processor of transformers that prepares pictures as the run did, up to the rounding of its resizing."""
    pre = trained.preprocessing
    return {
        "image_processor_type": "BitImageProcessor",  # the one with a shorter side and a crop in every release
        "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": trained.resize}, "resample": RESAMPLE[pre.interpolation],
        "do_center_crop": True, "crop_size": {"height": pre.size, "width": pre.size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(pre.mean), "image_std": list(pre.std),
    }  # fmt: skip


def timm_config(trained: Trained) -> dict[str, Any]:
    """What timm calls config.json on the hub."""
    pre = trained.preprocessing
    with torch.device("meta"):
        model: Any = trained.run.model().model
    known = model.pretrained_cfg
    return {
        "architecture": timm_file.architecture(trained),
        "num_classes": len(trained.classes), "num_features": model.num_features, "global_pool": model.global_pool,
        "label_names": trained.classes,
        "model_args": {"img_size": pre.size},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, pre.size, pre.size], "fixed_input_size": True, "interpolation": pre.interpolation,
            "crop_pct": timm_file.crop_pct(trained), "crop_mode": "center",
            "mean": list(pre.mean), "std": list(pre.std),
            "num_classes": len(trained.classes), "pool_size": None,
            "first_conv": known["first_conv"], "classifier": known["classifier"],
        },
    }  # fmt: skip


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
