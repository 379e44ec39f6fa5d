"""Freeze and replay in one process: what the server learns from what it has stored, and exact resume."""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import QUIET, assert_same_run, finetune, resumed, rows_of, with_method
from helpers.resuming import cut_off, whole

from snello.config import FinetuneConfig, ServeConfig, SplitConfig
from snello.data import splits_of
from snello.errors import CheckpointError, ConfigError, TrainingError
from snello.files import load_tensors
from snello.runs.folder import RunFolder
from snello.split import steps as steps_of
from snello.split.build import make_codec
from snello.split.halves import ClientHalf, ServerHalf
from snello.split.learner import LocalLink, SplitLearner, make_split_learner
from snello.split.local import LocalSession
from snello.split.server.command import serve
from snello.split.steps import ServerSteps
from snello.split.store import Samples, Store
from snello.split.wire import frames
from snello.train.loop import Trainer
from snello.train.place import LocalPlace
from snello.train.signals import Interrupted

SENT, TAIL, ALL = 7, 14, 21
"""Steps of `frozen`: those that are sent, those taken by then on what was sent and stored, and all."""


@pytest.fixture
def frozen(small) -> FinetuneConfig:
    """Three epochs of the server, one of which a frozen client sends; a step on stored samples after each, and then
    seven more.
    """
    split = SplitConfig(cut=2, codec="pca(2)", client="frozen", send_epochs=1, replay=1)
    return replace(small, epochs=3, checkpoint_steps=3, split=split)


def changed(config: FinetuneConfig, **split: Any) -> FinetuneConfig:
    return replace(config, split=replace(config.split, **split))


def trainer_of(config: FinetuneConfig) -> Trainer:
    return Trainer(config, splits_of(config), LocalPlace(config, make_split_learner), QUIET)


@pytest.fixture
def training(frozen) -> Iterator[Trainer]:
    trainer = trainer_of(frozen)
    yield trainer
    trainer.close()


def learner_of(trainer: Trainer) -> SplitLearner:
    assert isinstance(trainer.learner, SplitLearner)
    return trainer.learner


def steps(trainer: Trainer) -> ServerSteps:
    link = learner_of(trainer).link
    assert isinstance(link, LocalLink)
    return link.steps


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_who_trains_and_how_often(training):
    learner, server = learner_of(training), steps(training)
    before = [value.clone() for value in learner.half.vit.model.state_dict().values()]
    for step in range(SENT):
        moved = [value.clone() for value in server.model.half.parameters()]
        training.advance(1)
        assert server.done == (2 * (step + 1) if step < SENT - 1 else 2 * SENT - 1) and len(server.store) == step + 1
        assert any(not torch.equal(a, b) for a, b in zip(moved, server.model.half.parameters(), strict=True))
    assert training.progress.step == SENT and not training.progress.finished and server.behind == ALL - server.done
    while not training.progress.finished:
        assert training.advance(1) == []
    assert server.done == ALL and server.behind == 0
    after = learner.half.vit.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "a frozen half does not move"


def test_nothing_comes_down_but_the_loss(frozen):
    summary = finetune(frozen, QUIET)
    down, up = summary["downlink_bytes_by_kind"], summary["uplink_bytes_by_kind"]
    assert down["gradients"] == 4 * SENT and up["activations"] > 0
    sent = RunFolder(frozen.out).store_file.stat().st_size
    assert sent == summary["uplink_bytes"], "the file is the frames that came, and nothing else"
    assert summary["steps"] == SENT


@pytest.mark.parametrize("codec", ["none", "pca(2)", "adc(0.3)"])
def test_the_file_is_the_sum_of_the_frames(frozen, codec, monkeypatch):
    total = []
    exchange = LocalLink.exchange

    def watched(self, frame):
        if frame.kind == frames.Kind.ACTIVATIONS:
            total.append(b"".join(frames.write(frame)))
        return exchange(self, frame)

    monkeypatch.setattr(LocalLink, "exchange", watched)
    finetune(changed(frozen, codec=codec), QUIET)
    assert RunFolder(frozen.out).store_file.read_bytes() == b"".join(total) and len(total) == SENT


@pytest.mark.parametrize("codec", ["none", "pca(2)", "adc(0.3)", "fedlite(8)", "c3sl(2)"])
def test_frames_that_are_only_counted_give_the_same(frozen, tmp_path, codec):
    config = changed(frozen, codec=codec)
    finetune(replace(config, out=tmp_path / "frames"), QUIET)
    finetune(changed(config, frames=False), QUIET)
    assert_same_run(config.out, tmp_path / "frames")


def test_the_rates_are_those_of_as_many_steps(frozen, monkeypatch):
    rates = []
    update = ServerHalf.update
    monkeypatch.setattr(ServerHalf, "update", lambda self, lr, overflow: rates.append(lr) or update(self, lr, overflow))
    finetune(frozen, QUIET)
    at_once, rates = list(rates), []
    finetune(replace(frozen, out=frozen.out.with_name("all"), split=SplitConfig(cut=2, codec="none")), QUIET)
    assert at_once == rates and len(rates) == ALL


def test_every_step_on_stored_samples_has_a_draw_of_its_own(frozen, monkeypatch):
    seeds = []
    draw = steps_of.draw
    monkeypatch.setattr(steps_of, "draw", lambda store, num, seed: seeds.append((num, seed)) or draw(store, num, seed))
    finetune(frozen, QUIET)
    assert len({seed for _, seed in seeds}) == len(seeds) == TAIL and {num for num, _ in seeds} == {4}
    first = [seed for _, seed in seeds]
    seeds.clear()
    finetune(replace(frozen, out=frozen.out.with_name("other"), seed=1), QUIET)
    assert not {seed for _, seed in seeds} & set(first)


@pytest.mark.parametrize(("cutmix", "share"), [(None, 0.8), (0.0, None), (0.25, 0.25)])
def test_what_is_mixed(frozen, monkeypatch, cutmix, share):
    shares = []
    mix = steps_of.cutmix
    monkeypatch.setattr(
        steps_of, "cutmix", lambda samples, part, *rest: shares.append(part) or mix(samples, part, *rest)
    )
    finetune(changed(frozen, cutmix=cutmix), QUIET)
    assert shares == ([] if share is None else [share] * TAIL)


@pytest.mark.parametrize("accumulate", [2, 3, 16])
def test_a_step_has_as_many_samples_as_one_that_is_sent(frozen, monkeypatch, accumulate):
    """Also where more are accumulated than the frames hold that a draw takes at first."""
    seen = []
    learn = ServerHalf.learn

    def watched(self, samples: Samples, share: float):
        seen.append((len(samples.z), share))
        return learn(self, samples, share)

    monkeypatch.setattr(ServerHalf, "learn", watched)
    replays = []
    replay = ServerSteps.replay

    def watching(self):
        seen.clear()
        loss = replay(self)
        replays.append(list(seen))
        return loss

    monkeypatch.setattr(ServerSteps, "replay", watching)
    finetune(replace(frozen, accumulate=accumulate), QUIET)
    num = min(4 * accumulate, 26)
    assert replays and all(sum(n for n, _ in parts) == num for parts in replays)
    assert all(n <= 4 and share == n / num for parts in replays for n, share in parts)


def test_merged_rows_are_drawn_as_they_are(frozen, monkeypatch):
    """Of which there are fewer than samples."""
    rows = []
    learn = ServerHalf.learn

    def watched(self, samples: Samples, share: float):
        rows.append((samples.targets.clone(), share))
        return learn(self, samples, share)

    monkeypatch.setattr(ServerHalf, "learn", watched)
    finetune(changed(frozen, codec="adc(0.3)"), QUIET)
    assert any(bool((targets.amax(dim=1) < 1).any()) for targets, _ in rows), "labels are soft"
    assert all(torch.allclose(targets.sum(dim=1), torch.ones(len(targets))) for targets, _ in rows)


def test_a_client_that_trains_first_moves_until_then(frozen):
    config = changed(frozen, client="epochs:1")
    trainer = trainer_of(config)
    try:
        learner, digests = learner_of(trainer), []
        for step in range(2 * SENT):
            trainer.advance(1)
            digests.append([value.clone() for value in learner.half.vit.model.state_dict().values()])
            assert len(steps(trainer).store) == max(0, step + 1 - SENT)
        moved = [
            any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            for old, new in itertools.pairwise(digests)
        ]
        assert moved == [True] * (SENT - 1) + [False] * SENT
        assert steps(trainer).store._keys[0] == 0, "no frame refers to one from before"
    finally:
        trainer.close()


def test_the_rows_of_a_run_say_what_the_server_does(frozen):
    finetune(frozen, QUIET)
    stepped = rows_of(frozen.out, "step")
    assert [row["server_steps"] for row in stepped[:-1]] == [2 * step + 2 for step in range(SENT - 1)]
    assert all(row["replay_loss"] > 0 for row in stepped[:-1])
    replayed = rows_of(frozen.out, "replay")
    assert [row["server_step"] for row in replayed] == list(range(2 * SENT, ALL + 1))
    assert {row["step"] for row in replayed} == {SENT} and all(row["loss"] > 0 for row in replayed)
    summary = json.loads((frozen.out / "summary.json").read_text())
    seconds = [row["seconds"] for kind in ("step", "replay") for row in RunFolder(frozen.out).rows(kind)]
    assert summary["train_time_s"] == pytest.approx(sum(seconds), abs=2e-3)
    evaluated = rows_of(frozen.out, "eval")
    assert len(evaluated) == 1 and evaluated[0]["accuracy"] == summary["accuracy"]


def test_a_session_of_python_ends_with_the_tail(frozen, tmp_path):
    finetune(replace(frozen, out=tmp_path / "whole"), QUIET)
    session = LocalSession(frozen, console=QUIET)
    assert session.run(100)["steps"] == SENT
    session.finish()
    session.close()
    for name in ("model.safetensors", "last.safetensors"):
        one, other = (load_tensors(run / name)[0] for run in (frozen.out, tmp_path / "whole"))
        assert all(torch.equal(value, other[key]) for key, value in one.items())


# ------------------------------------------------------------------------------------------------------- exact resume

VARIANTS: dict[str, dict[str, Any]] = {
    "pca": {},
    "key frames": {"codec": "pca(2, basis=2)"},
    "none": {"codec": "none"},
    "tokens": {"codec": "adc(samples=1, tokens=0.5)+int4"},
    "merged tokens": {"codec": "adc(samples=1, tokens=0.5, rule=merge)+int4"},
    "merged samples": {"codec": "adc(0.3)"},
    "buffer": {"codec": "adc(0.5, buffer=2)", "accumulate": 2},
    "c3sl": {"codec": "c3sl(2)"},
    "randtopk": {"codec": "randtopk(0.2)"},
    "accumulate": {"accumulate": 2},
    "epochs": {"client": "epochs:1"},
    "alast": {"method": "alast", "alast": "server"},
    "alast as it is": {"method": "alast"},
    "alast, epochs": {"method": "alast", "client": "epochs:1"},
    "no tail": {"replay": 2},
    "no replay": {"replay": 0},
    "mixed": {"cutmix": 0.5},
}


def variant(config: FinetuneConfig, name: str) -> FinetuneConfig:
    options = dict(VARIANTS[name])
    epochs = 4 if "client" in options else 3
    config = replace(config, accumulate=options.pop("accumulate", 1), epochs=epochs)
    return with_method(changed(config), options.pop("method", "full"), split=replace(config.split, **options))


MOMENTS = {
    "at the start": (ClientHalf, "start", 1),
    "sending": (Trainer, "_backward", 6),
    "after a frame is stored": (ServerHalf, "answer_stored", 5),
    "on a stored sample": (ServerSteps, "replay", 4),
    "in the tail": (ServerSteps, "replay", -3),
    "at the last of all": (ServerSteps, "replay", -1),
    "before the last checkpoint": (LocalPlace, "save", -1),
}


def calls(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often in a run each of MOMENTS comes."""
    count: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for owner, name in {(owner, name) for owner, name, _ in MOMENTS.values()}:
            patch.setattr(owner, name, counting(count, name, getattr(owner, name)))
        finetune(config, QUIET)
    return count


def counting(count: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: count.update([name]) or function(*args, **options)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(frozen, tmp_path, monkeypatch, name):
    config = variant(frozen, name)
    other = tmp_path / "whole"
    total = calls(replace(config, out=other), monkeypatch)
    for moment, (owner, method, call) in MOMENTS.items():
        if abs(call) > total[method]:
            continue  # there is no such moment
        config = replace(config, out=tmp_path / moment)
        cut_off(config, monkeypatch, owner, method, call if call > 0 else total[method] + 1 + call)
        torch.manual_seed(99)
        finetune(resumed(config), QUIET)
        assert_same_run(config.out, other)
        assert (config.out / "store.frames").read_bytes() == (other / "store.frames").read_bytes()


@pytest.mark.slow
def test_cut_off_at_every_step_of_the_tail_and_before(frozen, tmp_path, monkeypatch):
    other = whole(frozen, tmp_path / "whole")
    for call in range(1, TAIL + 1):
        config = replace(frozen, out=tmp_path / str(call))
        cut_off(config, monkeypatch, ServerSteps, "replay", call)
        finetune(resumed(config), QUIET)
        assert_same_run(config.out, other)


def stop_in_the_tail(config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch, call: int) -> Trainer:
    """Runs until the `call`-th step on stored samples, where the user asks to stop."""
    seen: list[Trainer] = []
    wait, count = Trainer._wait, []

    def stopping(self):
        count.append(1)
        if len(count) == call:
            self._stop.append(2)
        seen.append(self)
        wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_wait", stopping)
        with pytest.raises(Interrupted, match=r"resume with: snello finetune"):
            finetune(config, QUIET)
    return seen[-1]


@pytest.mark.parametrize("name", ["pca", "merged samples", "alast", "epochs"])
@pytest.mark.slow
def test_ctrl_c_in_the_tail(frozen, tmp_path, monkeypatch, name):
    config = variant(frozen, name)
    other = whole(config, tmp_path / "whole")
    stopped = stop_in_the_tail(config, monkeypatch, 3)
    state = load_tensors(config.out / "last.safetensors")[1]
    assert state["learner"]["done"] == steps(stopped).done, "nothing is done twice"
    stop_in_the_tail(resumed(config), monkeypatch, 2)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


def test_what_a_run_stored_after_its_checkpoint_is_cut_off(frozen, monkeypatch):
    cut_off(frozen, monkeypatch, Trainer, "_backward", 6)
    file = RunFolder(frozen.out).store_file
    before = file.stat().st_size
    trainer = trainer_of(resumed(frozen))
    try:
        assert trainer.progress.step == 3 and len(steps(trainer).store) == 3 and file.stat().st_size < before
    finally:
        trainer.close()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(frozen, tmp_path, monkeypatch):
    config = replace(frozen, checkpoint_steps=0)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 5)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


@pytest.mark.parametrize("harm", ["deleted", "shortened", "flipped"])
def test_a_store_that_is_not_what_it_was_is_one_line_and_costs_nothing(frozen, tmp_path, monkeypatch, harm):
    other = whole(frozen, tmp_path / "whole")
    cut_off(frozen, monkeypatch, Trainer, "_backward", 6)
    file = RunFolder(frozen.out).store_file
    data = file.read_bytes()
    if harm == "deleted":
        file.unlink()
    else:
        file.write_bytes(data[:-5000] if harm == "shortened" else data[:200] + bytes([data[200] ^ 1]) + data[201:])
    before = {path.name: path.read_bytes() for path in frozen.out.iterdir()}
    with pytest.raises(CheckpointError, match=r"store\.frames") as caught:
        finetune(resumed(frozen), QUIET)
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in frozen.out.iterdir()}
    file.write_bytes(data)
    finetune(resumed(frozen), QUIET)
    assert_same_run(frozen.out, other)


def test_a_disk_that_is_full_ends_the_run_at_its_checkpoint(frozen, tmp_path, monkeypatch):
    other = whole(frozen, tmp_path / "whole")
    append, count = Store.append, []

    def full(self, *args):
        count.append(1)
        if len(count) == 6:
            raise CheckpointError("could not write store.frames: No space left on device")
        append(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "append", full)
        with pytest.raises(CheckpointError, match="No space left"):
            finetune(frozen, QUIET)
    finetune(resumed(frozen), QUIET)
    assert_same_run(frozen.out, other)


def test_a_loss_that_is_not_finite_in_the_tail(frozen, monkeypatch):
    learn, count = ServerHalf.learn, []

    def bad(self, samples: Samples, share: float):
        count.append(1)
        return learn(self, samples, share) * (float("nan") if len(count) == 2 * SENT + 3 else 1.0)

    monkeypatch.setattr(ServerHalf, "learn", bad)
    with pytest.raises(TrainingError, match=r"the loss on stored samples is not finite at step 7; the last good"):
        finetune(frozen, QUIET)
    assert load_tensors(frozen.out / "last.safetensors")[1]["learner"]["done"] < 17


def test_early_stopping_leaves_the_tail_out(frozen, monkeypatch):
    scores = iter([0.5, 0.4])
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self: replace(evaluate(self), accuracy=next(scores)))
    config = replace(changed(frozen, send_epochs=3, replay=0), patience=1, eval_epochs=1)
    summary = finetune(config, QUIET)
    assert summary["steps"] == 2 * SENT and summary["best_epoch"] == 1


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("client", ["frozen", "epochs:1"])
@pytest.mark.parametrize("send_epochs", [None, 1])
def test_a_codec_that_trains_on_the_client(frozen, tmp_path, client, send_epochs):
    """In one process, at the server and at the client, before anything is written."""
    config = changed(frozen, codec="bottlenet(0.5)", client=client, send_epochs=send_epochs, replay=0)
    message = rf"--split\.codec bottlenet\(0\.5\) does not go with --split\.client {client}"
    with pytest.raises(ConfigError, match=message):
        finetune(config, QUIET)
    served = ServeConfig(
        model="test_vit", weights="none", image_size=48, epochs=3, split=config.split, insecure_loopback=True
    )
    with pytest.raises(ConfigError, match=message):
        serve(replace(served, out=tmp_path / "server", listen="127.0.0.1:0"), QUIET)
    with pytest.raises(ConfigError, match=message):
        make_codec(config, str(config.split.codec_text), 64)  # what `snello join` does before it opens a session
    assert not frozen.out.exists() and not (tmp_path / "server").exists()
