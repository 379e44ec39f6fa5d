"""For timm: one safetensors file with weights in timm's own names, which `timm.create_model` loads."""

import json
from pathlib import Path

import timm
from safetensors.torch import save_file

from snello.export.trained import METADATA, Trained


def write(trained: Trained, path: Path) -> None:
    """Writes the file; its metadata says under METADATA what `Trained.about` does."""
    save_weights(trained, path, {METADATA: json.dumps(trained.about())})


def save_weights(trained: Trained, path: Path, metadata: dict[str, str]) -> None:
    """Writes the weights, in the names of the model, with metadata."""
    values = {name: value.detach().contiguous() for name, value in trained.state.items()}
    save_file(values, path, metadata={"format": "pt", **metadata})


def line(trained: Trained, path: str) -> str:
    """The line of Python that loads the file with timm."""
    return f"import {imports(trained)}; model = {_create(trained, path)}"


def code(trained: Trained, path: str) -> list[str]:
    """Lines of Python that classify a picture with the file."""
    text = f"""import json

import {imports(trained)}
from PIL import Image
from safetensors import safe_open

with safe_open({path!r}, framework="pt") as file:
    classes = json.loads(file.metadata()[{METADATA!r}])["classes"]
model = {_create(trained, path)}
transform = {transform(trained)}
image = Image.open("picture.jpg").convert("RGB")
logits = model(transform(image).unsqueeze(0))
print(classes[int(logits.argmax(1))])"""
    return [text]


def imports(trained: Trained, library: str = "timm") -> str:
    """What is imported to load the model: snello first where the model is one that it registers with timm."""
    entry = timm.models.model_entrypoint(architecture(trained))
    return f"snello, {library}" if entry.__module__.startswith("snello.") else library


def architecture(trained: Trained) -> str:
    """timm's name of the model, without the tag of its first weights."""
    return trained.settings.model.partition(".")[0]


def crop_pct(trained: Trained) -> float:
    """The share of a picture that makes timm, which rounds down, bring pictures to the size that the run had."""
    pre = trained.preprocessing
    same = int(pre.size / pre.crop_pct) == trained.resize
    return pre.crop_pct if same else pre.size / (trained.resize + 0.5)


def transform(trained: Trained) -> str:
    """The Python expression for the run's own way from a picture to the model's input."""
    pre = trained.preprocessing
    return (
        f"timm.data.create_transform({(3, pre.size, pre.size)}, interpolation={pre.interpolation!r}, "
        f"mean={pre.mean}, std={pre.std}, crop_pct={crop_pct(trained)!r})"
    )


def _create(trained: Trained, path: str) -> str:
    return (
        f"timm.create_model({trained.settings.model!r}, num_classes={len(trained.classes)}, "
        f"img_size={trained.preprocessing.size}, checkpoint_path={path!r}).eval()"
    )
