"""Both halves of a model that a cut parted, joined under the names of the whole; and whether weights fit a model."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from snello.config import ExportConfig, FinetuneConfig
from snello.errors import CheckpointError, ConfigError, ModelError
from snello.files import load_tensors
from snello.models.weights import misfits, some
from snello.runs.folder import RunFolder

State = Mapping[str, Tensor]
Shapes = Mapping[str, torch.Size]
Fetch = Callable[[Path], dict[str, Tensor]]


def whole_state(config: ExportConfig, fetch: Fetch | None) -> State:
    """The weights of a run's whole model, which are what its settings say; see `export`."""
    run = RunFolder(config.run)
    settings, resolved = run.read()
    if run.codec_file.exists():
        raise _codec_error(str(resolved.codec), run.path)
    whole, client, server = _shapes(run, settings)
    state: State = load_tensors(run.model_file)[0]
    if resolved.server is not None:
        rest, where = _server_half(config, fetch)
        if any(name.startswith("codec.") for name in rest):
            raise _codec_error(str(resolved.codec), where)
        state = _join(state, rest, client, server, f"the client's half in {run.path}", f"the server's half {where}")
    elif config.server_half is not None:
        raise ConfigError(f"--server-half has no effect: {config.run} is a run of `snello finetune` and has the model")
    _require_fit(state, whole, str(run.model_file))
    return state


def _codec_error(codec: str, where: Path | str) -> ModelError:
    return ModelError(
        f"the codec {codec} has weights that were trained with the model (in {where}), and no other software has a "
        "place for them: to export a run, train it with another --split.codec"
    )


def _shapes(run: RunFolder, settings: FinetuneConfig) -> tuple[Shapes, Shapes, Shapes]:
    """Names and shapes of the whole model, its client's half and its server's; without a cut both halves are empty."""
    with torch.device("meta"):
        vit = run.model()
    parts = [vit.model]
    if settings.split.cut:
        parts += [half.model for half in vit.cut(settings.split.cut, head_below=settings.split.labels == "client")]
    whole, *halved = [{name: value.shape for name, value in part.state_dict().items()} for part in parts]
    client, server = halved or ({}, {})
    return whole, client, server


def _server_half(config: ExportConfig, fetch: Fetch | None) -> tuple[State, str]:
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
    """Both halves as one; a CheckpointError where one lacks something, or has what is not its own, saying which."""
    if both := sorted(one.keys() & other.keys()):
        raise CheckpointError(f"{where} and {elsewhere} both have {some(both)}")
    for state, own, name in ((one, client, where), (other, server, elsewhere)):
        if missing := [key for key in own if key not in state]:
            raise CheckpointError(f"{name} lacks {some(missing)}")
        if unknown := [repr(key) for key in sorted(state.keys() - own.keys())]:
            raise CheckpointError(f"{name} has {some(unknown)}, which the run's settings do not put there")
        _require_fit(state, own, name)
    return {**one, **other}


def _require_fit(state: State, own: Shapes, where: str) -> None:
    if wrong := misfits(state, own):
        raise CheckpointError(f"{where} does not fit the model: {some(wrong)}")
