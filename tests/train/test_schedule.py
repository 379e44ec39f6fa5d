"""Which steps, pictures and learning rates a run has, also where a server takes more steps than are sent to it."""

from dataclasses import replace
from typing import Any

import pytest
from conftest import finetune, resumed

from snello.config import FinetuneConfig, SplitConfig
from snello.train import schedule
from snello.train.optim import lr_factor
from snello.train.schedule import Replay, Schedule, enough_epochs


def of(num_train: int = 26, *, epochs: int = 6, accumulate: int = 1, **split: object) -> Schedule:
    """The schedule of a cut run in batches of 4."""
    split_config = SplitConfig(cut=2, **split)  # type: ignore[arg-type]
    config = FinetuneConfig(epochs=epochs, batch_size=4, accumulate=accumulate, method="full", split=split_config)
    return Schedule.of(config, num_train)


@pytest.mark.parametrize(
    ("split", "steps", "replay"),
    [
        ({}, 42, None),
        ({"client": "frozen"}, 42, None),
        ({"client": "epochs:2"}, 42, None),
        ({"client": "frozen", "send_epochs": 6}, 42, Replay(0, 0, 42)),
        ({"client": "frozen", "send_epochs": 1, "replay": 5}, 7, Replay(0, 5, 42)),
        ({"client": "frozen", "send_epochs": 2}, 14, Replay(0, 0, 42)),
        ({"client": "frozen", "send_epochs": 4}, 28, Replay(0, 0, 42)),
        ({"client": "frozen", "send_epochs": 1}, 7, Replay(0, 0, 42)),
        ({"client": "frozen", "send_epochs": 1, "replay": 3}, 7, Replay(0, 3, 42)),
        ({"client": "epochs:2", "send_epochs": 1, "replay": 3}, 21, Replay(14, 3, 42)),
        ({"client": "epochs:3", "send_epochs": 2}, 35, Replay(21, 0, 42)),
    ],
    ids=str,
)
def test_what_is_sent_and_what_the_server_takes(split, steps, replay):
    schedule = of(**split)
    assert schedule.total_steps == steps and schedule.replay == replay
    assert schedule.server_steps == 42, "--epochs counts the server's steps, whatever is sent"


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("num_train", [26, 24, 3])
@pytest.mark.parametrize(
    "split",
    [
        {"client": "frozen", "send_epochs": 1},
        {"client": "frozen", "send_epochs": 4},
        {"client": "frozen", "send_epochs": 1, "replay": 1},
        {"client": "epochs:2", "send_epochs": 1},
        {"client": "epochs:1", "send_epochs": 2, "replay": 1},
    ],
    ids=str,
)
def test_server_steps(split, num_train, accumulate):
    schedule = of(num_train, accumulate=accumulate, **split)
    replay, total = schedule.replay, schedule.total_steps
    numbers = [schedule.server_step(step) for step in range(total + 1)]
    assert numbers[0] == 0 and numbers[: replay.first + 1] == list(range(replay.first + 1))
    between = [numbers[step + 1] - numbers[step] for step in range(replay.first, total - 1)]
    assert between == [1 + replay.each] * (total - replay.first - 1)
    assert numbers[-1] == schedule.server_steps == 6 * schedule.steps_per_epoch
    assert numbers[-1] - numbers[-2] >= 1 + replay.each, "what is left of --epochs comes after the last that is sent"
    assert [schedule.progress(step) for step in range(total)] == [n / schedule.server_steps for n in numbers[:-1]]


def test_nothing_is_left_where_replay_fills_the_epochs():
    schedule = of(client="frozen", send_epochs=2, replay=2)
    assert schedule.server_step(14) - schedule.server_step(13) == 1 + schedule.replay.each
    tail = of(client="frozen", send_epochs=2, replay=1)
    assert tail.server_step(14) - tail.server_step(13) == 1 + 1 + 14


def test_the_cosine_goes_over_the_steps_of_the_server():
    schedule = of(client="frozen", send_epochs=2, replay=1)
    rates = [schedule.lr(step, 1e-2, 0.1) for step in range(schedule.total_steps)]
    assert rates == [1e-2 * lr_factor(2 * step, 42, 0.1) for step in range(14)]
    assert [schedule.lr_at(step, 1e-2, 0.1) for step in range(42)] == [
        of().lr(step, 1e-2, 0.1) for step in range(42)
    ], "as many steps at the same rates as a run that sends all"
    assert schedule.lr_at(41, 1e-2, 0.1) < 1e-4


def test_the_last_batch_of_an_epoch_is_small_where_something_is_stored_too():
    schedule = of(client="epochs:1", send_epochs=2, accumulate=2)
    assert [schedule.num_samples(step) for step in range(schedule.total_steps)] == [8, 8, 8, 2] * 3
    assert [schedule.num_micro(step) for step in range(4)] == [2, 2, 2, 1]
    assert schedule.replay.first == 4 and schedule.server_steps == 24


@pytest.mark.parametrize(
    ("num_train", "settings", "epochs"),
    [
        (2000, {}, 8),  # 32 steps an epoch
        (16000, {}, 5),  # 250
        (100, {}, 50),  # 2
        (100, {"epochs": 3}, 3),
        (100, {"split": SplitConfig(cut=3)}, 5),
        (2000, {"accumulate": 2}, 16),
    ],
)
def test_few_pictures_take_more_epochs_unless_the_run_says_how_many(
    num_train: int, settings: dict[str, Any], epochs: int
) -> None:
    assert enough_epochs(FinetuneConfig(**settings), num_train) == epochs


def test_more_processes_make_fewer_steps() -> None:
    assert enough_epochs(FinetuneConfig(), 2000, processes=2) == 16


def test_a_run_that_does_not_say_how_long_is_resumed_as_long(
    small: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "LEAST_STEPS", 40)  # of 7 an epoch
    config = replace(small, epochs=None)
    assert finetune(config)["epochs"] == 6
    monkeypatch.setattr(schedule, "LEAST_STEPS", 80)
    assert finetune(resumed(config))["epochs"] == 6
