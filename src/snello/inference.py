"""Using a model: accuracy on labelled pictures, and classes with probabilities for others."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snello.config import EvaluateConfig, FinetuneConfig, PredictConfig
from snello.data import PictureSet, find_pictures, load_pictures, open_picture, splits_of
from snello.data.loaders import Batch, batches, eval_loader, eval_transform
from snello.devices import autocast, resolve_device, resolve_precision
from snello.errors import DataError
from snello.files import load_tensors
from snello.runs.checkpoint import load_into, with_weights
from snello.runs.folder import RunFolder
from snello.runs.resolved import Resolved
from snello.split.learner import make_split_learner
from snello.train.place import Setup
from snello.train.schedule import Schedule
from snello.train.scoring import Normalize, Score, score
from snello.vit import ViT, logits_of


class Predictor:
    """The model of a run folder, ready to be used.

    Raises:
        CheckpointError: where the folder holds no finished epoch.
        ConfigError: where the device is not there.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        run = RunFolder(path)
        self.config, self.resolved = config, resolved = run.read()
        run.require_model()
        self.classes = list(resolved.classes)
        self.device = resolve_device(device)
        fp16_on_cpu = resolved.precision == "fp16" and self.device.type == "cpu"
        self.precision = resolve_precision("fp32" if fp16_on_cpu else resolved.precision, self.device)
        weights = run.model_file if resolved.server is None else run.exported_weights()
        if weights is None:
            from snello.split.client.model import JoinedModel  # gRPC is only needed here

            self.model: nn.Module = JoinedModel(run, self.device, self.precision)
        else:
            vit = _load(run, weights)
            vit.model.to(self.device)
            in_halves = config.split.cut and resolved.server is None  # measured as in training: in evaluation's format
            self.model = self._over_the_cut(vit, run) if in_halves else vit.model
        self.model.eval()
        self.preprocessing = pre = resolved.pictures
        self.normalize = Normalize(self.preprocessing, self.device)
        self.transform = eval_transform(pre.size, pre.interpolation, pre.crop_pct)

    def close(self) -> None:
        """Ends the connection to the server, where the run has its other half there."""
        getattr(self.model, "close", lambda: None)()

    def _over_the_cut(self, vit: ViT, run: RunFolder) -> nn.Module:
        config = replace(self.config, split=replace(self.config.split, max_bytes=None))
        schedule = Schedule(1, config.batch_size, 1, 1)
        setup = Setup(config, len(self.classes), self.device, self.precision, schedule, self.resolved.codec)
        learner = make_split_learner(vit, setup)
        if "codec" in with_weights(learner.modules):
            load_into(learner.modules["codec"], load_tensors(run.codec_file)[0], f"{run.codec_file} does not fit")
        return learner.evaluator

    def score(self, labelled: Iterable[Batch]) -> Score:
        """Accuracy, overall and by class, and mean cross-entropy over labelled batches."""
        with autocast(self.device, self.precision):
            return score(self.model, labelled, len(self.classes), self.normalize, self.device)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, C) float32 on the CPU, of pictures (B, 3, H, W) uint8."""
        with autocast(self.device, self.precision):
            logits = logits_of(self.model(self.normalize(images.to(self.device))))
        probabilities: Tensor = logits.float().softmax(1).cpu()
        return probabilities


def load(run: Path | str, device: str = "auto") -> Predictor:
    """The model of a run folder, ready to be used; `close()` ends what it holds."""
    return Predictor(Path(run), device)


def _load(run: RunFolder, weights: Path) -> ViT:
    """The run's model with the weights of a file, in its own names or, in a folder for transformers, the hub's."""
    if weights.parent != run.path:
        return run.model(str(weights))
    vit = run.model()
    load_into(vit.model, load_tensors(weights)[0], f"{weights} does not fit {run.read()[0].model}")
    return vit


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Accuracy and loss of a run's model on its held-out pictures, or on those in `config.data`."""
    with closing(Predictor(config.run, config.device)) as predictor:
        pictures, num_skipped, notes = _pictures_of(config, predictor)
        loader = eval_loader(pictures, predictor.transform, batch_size=config.batch_size, workers=config.workers)
        result = predictor.score(batches(loader))
    return {
        "accuracy": result.accuracy,
        "balanced_accuracy": result.balanced_accuracy,
        "loss": result.loss,
        "pictures": len(pictures),
        "skipped": num_skipped,
        "notes": list(notes),
        "per_class": result.per_class(predictor.classes),
    }


def _pictures_of(config: EvaluateConfig, predictor: Predictor) -> tuple[PictureSet, int, tuple[str, ...]]:
    """The pictures to evaluate on, how many bad ones were left out, and notes as in `Splits`."""
    made = predictor.config if config.data is not None else at_home(predictor.config, predictor.resolved)
    skip_bad = config.skip_bad or (config.data is None and made.skip_bad)
    part = None if config.part == "auto" else config.part
    if config.data is None and part is None:
        moved = replace(made, data_root=config.data_root or made.data_root)
        splits = splits_of(moved, skip_bad=skip_bad, check=False)
        return splits.val, splits.num_skipped, splits.notes
    return load_pictures(
        made.data if config.data is None else config.data,
        predictor.classes,
        skip_bad=skip_bad,
        check=False,
        part=part,
        columns=made.columns if config.data is None else config.columns,
        data_root=config.data_root or made.data_root,
    )


def at_home(made: FinetuneConfig, resolved: Resolved) -> FinetuneConfig:
    """A run's settings with its pictures where they are now: its paths may have been relative to another folder.

    Raises:
        DataError: where they are no longer there.
    """
    if resolved.data_root is not None:
        made = replace(made, data_root=Path(resolved.data_root))
    if resolved.data is None:
        return made
    if not Path(resolved.data).exists():
        gone = f"the run's pictures are not in {resolved.data} any more"
        raise DataError(f"{gone}: give a source of pictures with --data")
    return replace(made, data=resolved.data)


def predict(config: PredictConfig) -> Iterator[dict[str, Any]]:
    """For each picture its path and its most probable classes; a bad picture is left out with `skip_bad`, counted last.

    Yields:
        `{"path", "classes": [{"class", "probability"}, ...]}` per picture, then `{"skipped": n}` where n > 0,
        then `{"notes": [...]}` where folders hold files that are no pictures.

    Raises:
        DataError: for a path that does not exist, or a picture that cannot be read.
    """
    paths, notes = find_pictures(config.paths)
    with closing(Predictor(config.run, config.device)) as predictor:
        yield from _predictions(config, predictor, paths)
    if notes:
        yield {"notes": list(notes)}


def _predictions(config: PredictConfig, predictor: Predictor, paths: list[Path]) -> Iterator[dict[str, Any]]:
    top_k, skipped = min(config.top_k, len(predictor.classes)), 0
    for start in range(0, len(paths), config.batch_size):
        images: list[tuple[Path, Tensor]] = []
        for path in paths[start : start + config.batch_size]:
            try:
                images.append((path, predictor.transform(open_picture(path))))
            except DataError as error:
                if not config.skip_bad:
                    raise DataError(f"{error} (--skip-bad leaves it out)") from error
                skipped += 1
        if not images:
            continue
        best = predictor.probabilities(torch.stack([image for _, image in images])).topk(top_k, dim=1)
        for (path, _), values, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
            classes = [
                {"class": predictor.classes[i], "probability": round(value, 6)}
                for i, value in zip(indices, values, strict=True)
            ]
            yield {"path": str(path), "classes": classes}
    if skipped:
        yield {"skipped": skipped}
