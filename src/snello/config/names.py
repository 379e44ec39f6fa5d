"""What other tools call a setting: names that mean the same, names that do not, and the nearest of ours.

Names are those of settings here, as `batch_size` or `alast.min_budget`; a flag says the same with dashes.
"""

import difflib
from collections.abc import Callable, Collection, Iterable

ALIASES = {
    "learning_rate": "lr",
    "base_lr": "lr",
    "imgsz": "image_size",
    "img_size": "image_size",
    "batch": "batch_size",
    "bs": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "max_epochs": "epochs",
    "num_train_epochs": "epochs",
    "num_workers": "workers",
    "dataloader_num_workers": "workers",
    "output_dir": "out",
    "out_dir": "out",
    "outdir": "out",
    "data_dir": "data",
    "data_path": "data",
    "wd": "weight_decay",
    "random_seed": "seed",
    "manual_seed": "seed",
    "gradient_accumulation_steps": "accumulate",
    "grad_accum_steps": "accumulate",
    "accumulation_steps": "accumulate",
    "accum_iter": "accumulate",
    "gradient_checkpointing": "grad_checkpointing",
    "max_grad_norm": "clip_norm",
    "clip_grad": "clip_norm",
    "smoothing": "label_smoothing",
    "label_smoothing_factor": "label_smoothing",
    "warmup_ratio": "warmup",
}
"""The same setting with the same values under another name: taken as a flag. Which tools use which is not said."""

_WEIGHTS = "--weights FILE starts from weights, and --resume with --out goes on with a run"
_PRECISION = "say --precision bf16, fp16 or fp32"
_DEVICE = "say --device cpu, cuda, cuda:1 or mps"
_TRACK = "say --track tensorboard, wandb or mlflow"
_WARMUP = "--warmup is the share of all steps"
_RUN = "the run folder comes first, without a flag"

HINTS: dict[str, tuple[str, str]] = {
    "amp": ("precision", _PRECISION),
    "arch": ("model", "say --model with a name of timm, or hf:NAME"),
    "architecture": ("model", "say --model with a name of timm, or hf:NAME"),
    "bf16": ("precision", _PRECISION),
    "checkpoint": ("weights", _WEIGHTS),
    "ckpt": ("weights", _WEIGHTS),
    "cpu": ("device", _DEVICE),
    "cuda": ("device", _DEVICE),
    "dataset": ("data", "say --data FOLDER, a table, hf:NAME or a torchvision set"),
    "dataset_name": ("data", "say --data hf:NAME"),
    "dtype": ("precision", _PRECISION),
    "early_stopping": ("patience", "say --patience with a number of epochs"),
    "early_stopping_patience": ("patience", "--patience counts epochs"),
    "finetune": ("weights", _WEIGHTS),
    "fp16": ("precision", _PRECISION),
    "freeze": ("method", "say --method last-k with --last-k, or --method head"),
    "gpu": ("device", _DEVICE),
    "gpus": ("device", "torchrun --nproc-per-node 2 -m snello ... runs on two"),
    "half": ("precision", _PRECISION),
    "host": ("listen", "say --listen ADDRESS:PORT"),
    "initial_checkpoint": ("weights", _WEIGHTS),
    "input_size": ("image_size", "--image-size is the side in pixels"),
    "load": ("weights", _WEIGHTS),
    "lr_scheduler": ("warmup", "the rate rises in --warmup and then follows a cosine to zero"),
    "lr_scheduler_type": ("warmup", "the rate rises in --warmup and then follows a cosine to zero"),
    "max_steps": ("epochs", "the length of a run is given in --epochs, not in steps"),
    "mixed_precision": ("precision", _PRECISION),
    "model_name": ("model", "say --model with a name of timm, or hf:NAME"),
    "model_name_or_path": ("model", "say --model hf:NAME_OR_FOLDER"),
    "num_steps": ("epochs", "the length of a run is given in --epochs, not in steps"),
    "opt": ("weight_decay", "snello trains with AdamW"),
    "optim": ("weight_decay", "snello trains with AdamW"),
    "optimizer": ("weight_decay", "snello trains with AdamW"),
    "output": ("out", "--out is the run folder itself"),
    "port": ("listen", "say --listen ADDRESS:PORT"),
    "pretrained": ("weights", "weights are pretrained unless --weights says none or names a file"),
    "project": ("out", "--out is the run folder itself"),
    "report_to": ("track", _TRACK),
    "run_dir": ("run", _RUN),
    "save_dir": ("out", "--out is the run folder itself"),
    "sched": ("warmup", "the rate rises in --warmup and then follows a cosine to zero"),
    "scheduler": ("warmup", "the rate rises in --warmup and then follows a cosine to zero"),
    "server": ("address", "the address comes first, without a flag"),
    "tensorboard": ("track", _TRACK),
    "train_batch_size": ("batch_size", "--batch-size is that of one process and pass, times --accumulate in a step"),
    "val_split": ("val_share", "--val-share is the share that is held out; a folder val/ is found by itself"),
    "wandb": ("track", _TRACK),
    "warmup_epochs": ("warmup", _WARMUP),
    "warmup_steps": ("warmup", _WARMUP),
}
"""Names that mean something near, or nothing here: the setting that it is about, and what to say instead."""
_RUN_HINTS = dict.fromkeys(("checkpoint", "ckpt", "model", "weights", "load", "pretrained"), ("run", _RUN))


def plain(name: str) -> str:
    """The name of a setting, of how a flag or a file spells it: `--Batch-size` is `batch_size`."""
    return name.lstrip("-").replace("-", "_").lower()


def advice(name: str, known: Collection[str], spell: Callable[[str], str] = str) -> str:
    """The end of a message that there is no setting `name`: what is meant among those `known`, as `spell` writes them.

    It is empty where nothing comes near.
    """
    name = plain(name)
    for hints in (HINTS, _RUN_HINTS):
        setting, text = hints.get(name, ("", ""))
        if setting in known:
            return f": {text}"
    meant = [ALIASES[name]] if ALIASES.get(name) in known else _same(name, known)
    if meant:
        return f": snello calls it {' or '.join(map(spell, meant))}"
    near = nearest(name, [*known, *map(_last, known), *ALIASES])
    found = [other for one in near for other in ([one] if one in known else _same(ALIASES.get(one, one), known))]
    return f"; nearest: {', '.join(map(spell, list(dict.fromkeys(found))[:3]))}" if found else ""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to three of the words `known` that `word` may be a misspelling of, those that begin with it first."""
    lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), lower, n=3, cutoff=0.65)
    return [lower[one] for one in sorted(close, key=lambda one: not one.startswith(word.lower()))]


def near_text(word: str, known: Iterable[str]) -> str:
    """The end of a message that `word` is none of those `known`; empty where nothing comes near."""
    near = nearest(word, known)
    return f"; nearest: {', '.join(near)}" if near else ""


def _same(name: str, known: Iterable[str]) -> list[str]:
    """The settings that are called `name` without their group, or with another sign behind it."""
    return [one for one in known if name in (one, _last(one), one.replace(".", "_"))]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
