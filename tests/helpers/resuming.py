"""Runs that are cut off as if their process were killed, and the same runs undisturbed."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUIET, finetune, resumed

from snello.config import FinetuneConfig
from snello.runs.folder import RunFolder
from snello.train.loop import Trainer
from snello.train.signals import Interrupted


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def whole(config: FinetuneConfig, path: Path) -> Path:
    """The run folder of the same run, not cut off."""
    finetune(replace(config, out=path, checkpoint_steps=0), QUIET)
    return path


def killed_at(call: int, function):
    """`function`, until the `call`-th time (from 1), which is the end."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise Killed
        return function(*args, **kwargs)

    return wrapped


def cut_off(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, owner, name: str, call: int) -> None:
    """Runs until the `call`-th call of `owner.name`."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed_at(call, getattr(owner, name)))
        with pytest.raises(Killed):
            finetune(config, QUIET)
    assert not RunFolder(config.out).summary_file.exists()


def stopped_and_resumed(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Runs until the `call`-th step, where the user asks to stop, and from there to the end."""
    step, seen = Trainer._step, []

    def stopping(self):
        seen.append(1)
        if len(seen) == call:
            self._stop.append(2)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(Interrupted):
            finetune(config, QUIET)
    finetune(resumed(config), QUIET)
