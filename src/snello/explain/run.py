"""A run as its folder has it: settings, pictures and model, each read once and only where a part asks for it."""

import json
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from snello.data import PictureSet, Splits, splits_of
from snello.data.loaders import eval_transform
from snello.devices import autocast
from snello.errors import CheckpointError, DataError, printable
from snello.files import load_tensors
from snello.inference import Predictor, at_home
from snello.methods.alast import AlastMethod
from snello.runs.checkpoint import load_into
from snello.runs.folder import RunFolder
from snello.seeds import mix, permutation
from snello.train.predictions import Predictions
from snello.train.scoring import Normalize
from snello.vit import ViT

CPU = torch.device("cpu")
_ORDER = 0x73686F77  # keeps the seed of what is shown apart from others
LIMIT = 256
"""Pictures that the model is asked about where nothing was noted in training."""
Side = Literal["client", "server"]
Row = dict[str, Any]
"""Of a held-out picture: index, name, label, predicted class, p of the label, and in `top` the best [class, p]."""


class Run:
    """A run folder.

    Raises:
        CheckpointError: where it is not that of a run.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self.path, self.report = RunFolder(path), path, path / "report"
        self.config, self.resolved = self.folder.read()
        self.classes = self.resolved.classes
        self.cut = self.config.split.cut

    @cached_property
    def splits(self) -> Splits:
        """The pictures of the run; a DataError where they are no longer there, or no longer the same."""
        known = self.resolved
        if known.data is not None and not Path(known.data).exists():
            raise DataError(f"the run's pictures are not in {printable(known.data)} any more")
        # Bad ones are looked for only where there were any: it takes as long as reading all.
        splits = splits_of(at_home(self.config, known), skip_bad=known.num_skipped > 0, check=False)
        same = splits.train.classes == known.classes and known.num_val in (0, len(splits.val))
        prints = f"{splits.train.fingerprint()}-{splits.val.fingerprint()}"
        if not same or known.fingerprint not in (None, prints):
            raise DataError(f"the pictures are not those that the run was made with ({splits.source})")
        return splits

    @property
    def held_out(self) -> PictureSet:
        """The held-out pictures."""
        return self.splits.val

    @cached_property
    def order(self) -> list[int]:
        """The held-out pictures in an order that is drawn, always the same."""
        return permutation(len(self.held_out), mix(_ORDER, self.config.seed))

    @cached_property
    def predictions(self) -> list[Row]:
        """What the model says of the held-out pictures, as training has noted it; or else of LIMIT of them, as it is.

        Nothing where the other half is on a server, which is not asked.

        Raises:
            CheckpointError: where the file is of other pictures or classes.
        """
        file, num = self.report / "predictions.jsonl", len(self.held_out)
        if not file.is_file():
            return [] if self.resolved.server is not None else self._predict(self.order[:LIMIT])
        try:
            rows: list[Row] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            fits = all(
                0 <= row["index"] < num and self.held_out.labels[row["index"]] == row["label"] and row["top"]
                for row in rows
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"could not read {file}: {error}") from None
        if not fits:
            raise CheckpointError(f"{file} is of other pictures than the run: remove it")
        return rows

    def _predict(self, indices: list[int]) -> list[Row]:
        indices, size = sorted(indices), self.config.batch_size
        pictures = self.held_out.subset(indices)
        said = Predictions(len(indices), len(self.classes), 0, CPU)
        with closing(Predictor(self.path, "cpu")) as predictor:
            for start in range(0, len(indices), size):
                images = torch.stack([self.image(index) for index in indices[start : start + size]])
                labels = torch.tensor(pictures.labels[start : start + size])
                said.add(predictor.probabilities(images).log(), labels)  # as good as logits: softmax gives them back
        return [{**row, "index": index} for index, row in zip(indices, said.rows(pictures), strict=True)]

    def image(self, index: int) -> Tensor:
        """A held-out picture as the model sees it, (3, H, W) uint8."""
        pixels: Tensor = self._transform(self.held_out.open(index))
        return pixels

    def normalized(self, images: list[Tensor]) -> Tensor:
        """Pictures as the model wants them, (B, 3, H, W) float32."""
        return Normalize(self.resolved.pictures, CPU)(torch.stack(images))

    @cached_property
    def _transform(self) -> Any:
        pre = self.resolved.pictures
        return eval_transform(pre.size, pre.interpolation, pre.crop_pct)

    def picture(self, image: Tensor) -> Image.Image:
        """A picture of its pixels (3, H, W) uint8."""
        return Image.fromarray(image.permute(1, 2, 0).numpy())

    def precision(self) -> AbstractContextManager[object]:
        """What the run computes in, where that was on a CPU; else what any CPU is good at."""
        on_cpu = self.resolved.device == "cpu"
        return autocast(CPU, self.resolved.precision) if on_cpu else nullcontext()  # type: ignore[arg-type]

    def model(self) -> ViT:
        """The model with the weights that were kept.

        Raises:
            CheckpointError: where no epoch was finished, or the weights do not fit.
        """
        self.folder.require_model()
        vit = self.folder.model()
        file = self.folder.model_file
        load_into(vit.model, load_tensors(file)[0], f"{file} does not fit {self.config.model}")
        return vit

    def attach(self, vit: ViT, side: Side | None = None) -> AlastMethod | None:
        """ALaST with the budgets of the run's last step, on the model or a half of it; None for other methods.

        A run may end with steps that drop nothing: then they are those of the last step that did.
        """
        split, method = self.config.split, self.config.method_name
        where = "server" if split.freezes else split.alast
        if "alast" not in method or (side is not None and where not in (side, "both")):
            return None
        # Budgets that were scaled to meet a target are known, so there is nothing left to scale.
        alast = AlastMethod(vit, replace(self.config, alast=replace(self.config.alast, flops=None, time=None)))
        state = self._alast_state(side, vit.depth)
        if state:
            alast.budgets, alast.trained = list(state["budgets"]), list(state["trained"])
        return alast

    def _alast_state(self, side: Side | None, depth: int) -> dict[str, Any]:
        """Budgets and trained blocks as alast.json has them; where it is missing, as the last step was logged."""
        if self.folder.alast_file.is_file():
            state = json.loads(self.folder.alast_file.read_text(encoding="utf-8"))
            state = state if side is None else state.get(side)
            if state:
                scaled = (state.get("target") or {}).get("scaled")
                return {"budgets": scaled or state["budgets"], "trained": state["trained"]}
        rows = [row for row in self.folder.rows("step") if "budgets" in row]
        if not rows:
            return {}
        first = self.cut if side == "server" else 0
        budgets = rows[-1].get("step_budgets", rows[-1]["budgets"])[first : first + depth]
        trained = [block - first for block in rows[-1]["trained"] if first <= block < first + depth]
        return {"budgets": budgets, "trained": trained} if len(budgets) == depth else {}
