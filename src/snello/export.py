"""Writing a run's model as a file that timm loads by itself, joined from both halves where a cut parted them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snello.checkpoint import load_tensors, replacing
from snello.config import ExportConfig, FinetuneConfig
from snello.errors import CheckpointError, ConfigError, ModelError
from snello.models import create_model
from snello.runs import RunFolder
from snello.vit import ViT

METADATA = "snello_export"  # not "snello", which marks checkpoints
NAMED = 3
"""Weights that an error names; it counts the others."""

State = Mapping[str, Tensor]
Shapes = Mapping[str, torch.Size]


def export(config: ExportConfig, fetch: Callable[[Path], dict[str, Tensor]] | None = None) -> Path:
    """Writes the best weights of a run, whole or not at all, and returns the file.

    Its metadata says under METADATA, as JSON: model, num_classes, classes, image_size, mean, std, interpolation and
    crop_pct; `loading_line` makes the line of Python of it that loads the file.

    Args:
        config: of the export.
        fetch: for a run of `snello join` without --server-half: gets the server's half for the run folder.

    Raises:
        CheckpointError: where the folder holds no finished epoch, a file cannot be read or written, or the halves do
            not make the model.
        ConfigError: where --out is there already, or --server-half is missing or of no use.
        ModelError: where a trained codec belongs to the model, which timm has no place for.
    """
    run = RunFolder(config.run)
    settings, resolved = _read(run)
    out = config.out or run.path / "export.safetensors"
    _require_free(out)
    if run.codec_file.exists():
        raise _codec_error(resolved.get("codec", settings.split.codec), run.path)
    whole, client, server = _shapes(settings, len(resolved["classes"]))
    state, _ = load_tensors(run.model_file)
    if "server" in resolved:
        rest, where = _server_half(config, fetch)
        if any(name.startswith("codec.") for name in rest):
            raise _codec_error(resolved.get("codec", settings.split.codec), where)
        state = _join(state, rest, client, server, f"the client's half in {run.path}", f"the server's half {where}")
    elif config.server_half is not None:
        raise ConfigError(f"--server-half has no effect: {config.run} is a run of `snello finetune` and has the model")
    _require_fit(state, whole, str(run.model_file))
    _write(out, state, _describe(settings, resolved))
    return out


def loading_line(path: Path) -> str:
    """The line of Python that loads an exported file with timm.

    Raises:
        CheckpointError: where the file cannot be read, or was not made by `export`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not read {path}: {error}") from error
    except (KeyError, ValueError):
        raise CheckpointError(f"{path} was not made by `snello export`") from None
    own = timm.models.model_entrypoint(about["model"].partition(".")[0]).__module__.startswith("snello.")
    return (
        f"import {'snello, ' if own else ''}timm; model = timm.create_model({about['model']!r}, "
        f"num_classes={about['num_classes']}, img_size={about['image_size']}, checkpoint_path={str(path)!r}).eval()"
    )


def _read(run: RunFolder) -> tuple[FinetuneConfig, dict[str, Any]]:
    """The settings of a run that has finished an epoch, and what was resolved."""
    settings, resolved = run.read_config()
    if not isinstance(resolved, dict) or not {"classes", "preprocessing"} <= resolved.keys():
        raise CheckpointError(f"{run.config_file} is not that of a run: it does not say what was resolved")
    if not run.model_file.is_file():
        raise CheckpointError(f"{run.path} holds no model yet: its run has not finished an epoch")
    return settings, resolved


def _require_free(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out {out} is there already: remove it, or name another file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")


def _codec_error(codec: str, where: Path | str) -> ModelError:
    return ModelError(
        f"the codec {codec} has weights that were trained with the model (in {where}), and a timm model has no place "
        "for them: to export a run, train it with another --split.codec"
    )


def _shapes(settings: FinetuneConfig, num_classes: int) -> tuple[Shapes, Shapes, Shapes]:
    """What the whole model has, the client's half of it and the server's; without a cut both are empty."""
    with torch.device("meta"):
        model = create_model(settings.model, "none", num_classes, settings.image_size)
    parts = [model]
    if settings.split.cut:
        halves = ViT(model).cut(settings.split.cut, head_below=settings.split.labels == "client")
        parts += [half.model for half in halves]
    whole, *halved = [{name: value.shape for name, value in part.state_dict().items()} for part in parts]
    client, server = halved or ({}, {})
    return whole, client, server


def _server_half(config: ExportConfig, fetch: Callable[[Path], dict[str, Tensor]] | None) -> tuple[State, str]:
    """The weights of the server's half, and where they are from."""
    path = config.server_half
    if path is None:
        if fetch is None:
            raise ConfigError(f"{config.run} has only the client's half: give the server's with --server-half")
        return fetch(config.run), "that the server gave"
    if path.is_dir():
        half = RunFolder(path)
        if half.codec_file.exists():
            raise _codec_error("of the cut", path)
        path = half.model_file
    return load_tensors(path)[0], f"in {path}"


def _join(one: State, other: State, client: Shapes, server: Shapes, where: str, elsewhere: str) -> dict[str, Tensor]:
    """Both halves as one.

    Raises:
        CheckpointError: where a half lacks something, or has what is not its own, saying which.
    """
    if both := sorted(one.keys() & other.keys()):
        raise CheckpointError(f"{where} and {elsewhere} both have {_some(both)}")
    for state, own, name in ((one, client, where), (other, server, elsewhere)):
        if missing := [key for key in own if key not in state]:
            raise CheckpointError(f"{name} lacks {_some(missing)}")
        if unknown := [repr(key) for key in sorted(state.keys() - own.keys())]:
            raise CheckpointError(f"{name} has {_some(unknown)}, which the run's settings do not put there")
        _require_fit(state, own, name)
    return {**one, **other}


def _require_fit(state: State, own: Shapes, where: str) -> None:
    """Raises a CheckpointError unless names and shapes are those of the model."""
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key!r} is unknown" for key in sorted(state.keys() - own.keys())]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, the model's is {tuple(shape)}"
        for key, shape in own.items()
        if key in state and state[key].shape != shape
    ]
    if wrong:
        raise CheckpointError(f"{where} does not fit the model: {_some(wrong)}")


def _some(names: list[str]) -> str:
    more = f" (+{len(names) - NAMED} more)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _describe(settings: FinetuneConfig, resolved: Mapping[str, Any]) -> dict[str, Any]:
    pre = resolved["preprocessing"]
    return {
        "model": settings.model,
        "num_classes": len(resolved["classes"]),
        "classes": resolved["classes"],
        "image_size": pre["size"],
        **{name: pre[name] for name in ("mean", "std", "interpolation", "crop_pct")},
    }


def _write(path: Path, state: State, about: Mapping[str, Any]) -> None:
    values = {name: value.detach().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(values, temporary, metadata={"format": "pt", METADATA: json.dumps(about)})
