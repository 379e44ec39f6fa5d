"""ALaST in lightning.Trainer: every test is a real training on the CPU, of a ViT of 4 blocks."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_vit, write_pictures
from helpers.ranks import run_ranks

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snello.errors import CheckpointError, ConfigError, ModelError
from snello.integrations.lightning import ALaSTCallback, _check_strategy
from snello.methods.alast import ALaST
from snello.vit import ViT

OPTIONS: dict[str, Any] = {"blocks": 2, "start_budget": 0.7, "alpha": 0.05}

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Module(LightningModule):
    """A ViT beside something that is none, as users write them."""

    def __init__(self, vit: nn.Module | None = None, seed: int = 0, **more: nn.Module) -> None:
        super().__init__()
        self.vit = tiny_vit() if vit is None else vit
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        for name, module in more.items():
            self.add_module(name, module)
        self.noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(self.vit(batch[0] + self.noise), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.vit(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """Seven batches in an order of the epoch; says where it stands, as Lightning asks of a loader that resumes."""

    def __init__(self) -> None:
        self.epoch, self.index = 0, 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        if self.index == 7:  # Lightning asks for no more than len()
            self.epoch, self.index = self.epoch + 1, 0
        order = torch.randperm(7, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.index < 7:
            generator = torch.Generator().manual_seed(order[self.index])
            self.index += 1
            yield torch.randn(4, 3, 16, 16, generator=generator), torch.randint(5, (4,), generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]


class Spy(Callback):
    """What each optimizer step ran with."""

    def __init__(self, ours: ALaSTCallback | None) -> None:
        self.ours = ours
        self.rows: list[Any] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [name for name, p in pl_module.vit.named_parameters() if p.grad is not None]
        alast = self.ours and self.ours.alast
        self.rows.append({"grads": grads, "budgets": alast and list(alast.budgets), "trained": alast and alast.trained})
        if alast:
            self.rows[-1] |= {"dropping": alast.dropping, "forwards": len(alast.state_dict()["pending"])}


def fit(folder: Path, callback: ALaSTCallback | None, module=None, resume=None, more=(), **options: Any):
    """A training of 2 epochs of 4 optimizer steps, each of 2 micro-batches, the epochs' last of one."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "logger": False,
        "enable_checkpointing": any(isinstance(other, ModelCheckpoint) for other in more),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    spy, module = Spy(callback), Module() if module is None else module
    trainer = Trainer(**{**defaults, **options}, callbacks=[*([callback] if callback else []), spy, *more])
    held_out = DataLoader([next(iter(Batches()))], batch_size=None)
    trainer.fit(module, Batches(), held_out, ckpt_path=resume)
    return module, spy, trainer


def assert_same_weights(one: Any, other: Any) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_one_step_of_alast_per_optimizer_step(tmp_path):
    module, spy, trainer = fit(tmp_path, ALaSTCallback(**OPTIONS))
    assert trainer.global_step == len(spy.rows) == 8 and len(module.losses) == 14
    assert [row["forwards"] for row in spy.rows] == [2, 2, 2, 1] * 2  # micro-batches since ALaST's last step
    for row in spy.rows:
        blocks = {int(name.split(".")[1]) for name in row["grads"] if name.startswith("blocks.")}
        assert blocks == set(row["trained"]) and len(blocks) == 2
        assert "head.weight" in row["grads"] and "cls_token" in row["grads"]
    assert len({tuple(row["trained"]) for row in spy.rows}) > 1
    assert spy.rows[0]["budgets"] == spy.rows[1]["budgets"] == [0.7, 0.7, 1.0, 1.0]  # nothing to compare with before
    assert len({tuple(row["budgets"]) for row in spy.rows}) == 7


def test_the_model_is_left_as_it_was_found(tmp_path):
    module = Module()
    module.vit.blocks[1].attn.qkv.weight.requires_grad_(False)
    found = {name: p.requires_grad for name, p in module.named_parameters()}
    fit(tmp_path, ALaSTCallback(**OPTIONS, train_embeddings=False), module, max_steps=2)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == found
    ALaST(module.vit).detach()


def test_after_an_error_the_model_is_as_it_was_found_and_trains_again(tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("broken")

    module, callback = Module(), ALaSTCallback(**OPTIONS)
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, callback, module, more=[Broken()])
    assert not any("forward" in vars(block) for block in module.vit.blocks)
    assert all(p.requires_grad for p in module.parameters())
    _, spy, _ = fit(tmp_path, callback, module)
    assert [row["forwards"] for row in spy.rows] == [2, 2, 2, 1] * 2


def test_the_base_learning_rate_is_the_step_size_not_the_scheduled_one(tmp_path):
    _, ours, _ = fit(tmp_path, ALaSTCallback(**{**OPTIONS, "adapt": "difference", "alpha": None}))
    _, expected, _ = fit(tmp_path, ALaSTCallback(**{**OPTIONS, "adapt": "difference", "alpha": 1e-2}))
    assert ours.rows == expected.rows and len({tuple(row["budgets"]) for row in ours.rows}) > 2


def test_evaluation_in_between_changes_nothing(tmp_path):
    one, rows, _ = fit(tmp_path, ALaSTCallback(**OPTIONS), num_sanity_val_steps=0, limit_val_batches=0)
    other, others, _ = fit(tmp_path, ALaSTCallback(**OPTIONS), val_check_interval=1)
    assert rows.rows == others.rows
    assert_same_weights(one, other)


def test_the_tail_drops_no_tokens(tmp_path):
    _, spy, _ = fit(tmp_path, ALaSTCallback(**OPTIONS, full_tail=0.25))
    assert [row["dropping"] for row in spy.rows] == [True] * 6 + [False] * 2
    with pytest.raises(ConfigError, match="full_tail needs to know where training ends"):
        fit(tmp_path, ALaSTCallback(**OPTIONS, full_tail=0.25), max_epochs=-1)


@pytest.mark.parametrize("log", ["blocks", "mean", "none"])
def test_budgets_and_trained_blocks_go_to_the_loggers(log, tmp_path):
    logger = CSVLogger(tmp_path)
    _, spy, _ = fit(tmp_path, ALaSTCallback(**OPTIONS, log=log), logger=logger, log_every_n_steps=2)
    if log == "none":
        assert not (Path(logger.log_dir) / "metrics.csv").exists()
        return
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert len(logged) == 4
    for row, ran in zip(logged, spy.rows[1::2], strict=True):
        expected = {"alast/budget_mean": sum(ran["budgets"]) / 4, "alast/budget_min": min(ran["budgets"])}
        if log == "blocks":
            expected |= {f"alast/budget_{i}": ran["budgets"][i] for i in range(4)}
            expected |= {f"alast/trained_{i}": float(i in ran["trained"]) for i in range(4)}
        ours = {key: float(value) for key, value in row.items() if key.startswith("alast/")}
        assert ours == pytest.approx(expected, rel=1e-6)


# Resuming


@pytest.mark.parametrize("ours", [True, False], ids=["alast", "control"])
@pytest.mark.parametrize("stop_at", [3, 4], ids=["inside-an-epoch", "between-epochs"])
@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(stop_at, ours, tmp_path):
    """The control, without ALaST, shows that Lightning itself does so."""
    options = {**OPTIONS, "full_tail": 0.25, "optimizer_state": "release"}
    make = (lambda: ALaSTCallback(**options)) if ours else (lambda: None)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, spy, _ = fit(tmp_path, make(), more=[saving])
    path = tmp_path / f"step={stop_at}.ckpt"
    rest, second, trainer = fit(tmp_path, make(), Module(tiny_vit(seed=1)), resume=path)
    assert trainer.global_step == 8
    assert second.rows == spy.rows[stop_at:] and len(second.rows) == 8 - stop_at
    assert rest.losses == whole.losses[-len(rest.losses) :]
    assert_same_weights(rest, whole)
    if ours:
        state = torch.load(path, weights_only=True)["callbacks"]["ALaSTCallback"]
        assert state["drawn_at"] == stop_at - 1 and state["snello"]["settings"]["blocks"] == 2


def test_a_checkpoint_that_is_not_ours_is_refused_in_one_line(tmp_path):
    for name, callback in (("without", None), ("with", ALaSTCallback(**OPTIONS))):
        fit(tmp_path, callback, max_steps=2, more=[ModelCheckpoint(tmp_path, name, every_n_train_steps=2)])
    module = Module()
    with pytest.raises(CheckpointError) as error:
        fit(tmp_path, ALaSTCallback(**OPTIONS), module, tmp_path / "without.ckpt")
    assert str(error.value).startswith("the checkpoint holds no state of ALaST") and "\n" not in str(error.value)
    assert not any("forward" in vars(block) for block in module.vit.blocks)
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(CheckpointError) as error:
        fit(tmp_path, ALaSTCallback(**{**OPTIONS, "start_budget": 0.8}), resume=tmp_path / "with.ckpt")
    assert str(error.value) == (
        "the checkpoint is of ALaST with start_budget=0.7, but ALaSTCallback was given start_budget=0.8"
    )


def test_a_callback_that_resumed_starts_anew_without_a_checkpoint(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    callback = ALaSTCallback(**OPTIONS)
    fit(tmp_path, callback, more=[saving])
    fit(tmp_path, callback, resume=tmp_path / "step=4.ckpt")
    _, spy, _ = fit(tmp_path, callback)
    _, fresh, _ = fit(tmp_path, ALaSTCallback(**OPTIONS))
    assert spy.rows == fresh.rows


# Which model, which strategy


def test_the_vit_is_found_or_named(tmp_path):
    assert fit(tmp_path, ALaSTCallback(**OPTIONS, module="vit"), max_steps=1)[1].rows[0]["trained"]
    both = Module(teacher=tiny_vit().requires_grad_(False))
    with pytest.raises(ModelError, match=r'has several Vision Transformers \(vit, teacher\).*module="backbone"'):
        fit(tmp_path, ALaSTCallback(**OPTIONS), both)
    assert fit(tmp_path, ALaSTCallback(**OPTIONS, module="vit"), both, max_steps=1)[1].rows[0]["trained"]
    none = Module(nn.Linear(3, 5))
    with pytest.raises(
        ModelError, match="vit of the LightningModule, its largest module: model Linear is not supported"
    ):
        fit(tmp_path, ALaSTCallback(**OPTIONS), none)
    with pytest.raises(
        ModelError, match="vit of the LightningModule, its largest module: the model is already compiled"
    ):
        fit(tmp_path, ALaSTCallback(**OPTIONS), Module(torch.compile(tiny_vit())))
    with pytest.raises(ModelError, match="has no module 'backbone'"):
        fit(tmp_path, ALaSTCallback(module="backbone"))


def test_a_model_in_eval_mode_is_refused(tmp_path):
    module = Module()
    module.vit.eval()  # Lightning leaves it so
    with pytest.raises(ModelError, match=r"in eval mode, in which ALaST does nothing: call its train\(\)"):
        fit(tmp_path, ALaSTCallback(**OPTIONS), module)
    assert not any("forward" in vars(block) for block in module.vit.blocks)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ALaST has no option block; it has: blocks, start_budget"):
        ALaSTCallback(block=3)
    with pytest.raises(ConfigError, match=r"blocks must be in 1\.\.4"):
        fit(tmp_path, ALaSTCallback(blocks=5))


def test_what_would_drift_apart_in_parallel_is_refused():
    _check_strategy(SingleDeviceStrategy())
    _check_strategy(DDPStrategy(find_unused_parameters=True))
    for strategy in (DDPStrategy(), DDPStrategy(find_unused_parameters=True, static_graph=True)):
        with pytest.raises(ConfigError, match=r'Trainer\(strategy="ddp_find_unused_parameters_true"\)'):
            _check_strategy(strategy)
    with pytest.raises(ConfigError, match="does not work under FSDPStrategy"):
        _check_strategy(FSDPStrategy())


def _rank(rank: int, folder: Path) -> dict[str, Any]:
    parallel = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "use_distributed_sampler": False}
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, spy, _ = fit(folder, ALaSTCallback(**OPTIONS), Module(seed=rank), more=[saving], **parallel)
    rest, second, trainer = fit(folder, ALaSTCallback(**OPTIONS), Module(seed=rank), folder / "step=3.ckpt", **parallel)
    assert second.rows == spy.rows[3:] and isinstance(trainer.strategy, DDPStrategy)
    assert_same_weights(rest, whole)
    return {"weights": whole.state_dict(), "rows": spy.rows, "losses": whole.losses}


@pytest.mark.slow
def test_two_processes_stay_equal_and_resume_exactly(tmp_path):
    one, other = run_ranks(_rank, tmp_path)
    assert one["rows"] == other["rows"] and len(one["rows"]) == 8
    assert one["losses"] != other["losses"]  # their data differ
    assert len({tuple(row["trained"]) for row in one["rows"]}) > 1
    assert len({tuple(row["budgets"]) for row in one["rows"]}) == 7
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name


@pytest.mark.slow
def test_a_compiled_module_is_traced_with_alast(tmp_path):
    torch._dynamo.reset()
    options = {"blocks": 1, "start_budget": 0.7, "alpha": 0.0, "draw": "lowest-first"}  # few things to trace
    plain, eager, _ = fit(tmp_path, ALaSTCallback(**options), Module(tiny_vit(depth=2)), max_steps=2)
    module = Module(tiny_vit(depth=2))
    compiled = torch.compile(module, backend="eager")
    _, spy, _ = fit(tmp_path, ALaSTCallback(**options), compiled, max_steps=2)
    torch._dynamo.reset()
    assert module.losses == pytest.approx(plain.losses, rel=1e-4)
    assert spy.rows[0]["grads"] == eager.rows[0]["grads"] and spy.rows[0]["trained"] == [1]


def test_gradient_checkpointing_gives_the_same(tmp_path):
    plain, rows, _ = fit(tmp_path, ALaSTCallback(**OPTIONS))
    module = Module()
    ViT(module.vit).set_grad_checkpointing(True)
    _, recomputed, _ = fit(tmp_path, ALaSTCallback(**OPTIONS), module)
    assert module.losses == pytest.approx(plain.losses, rel=1e-4)
    assert [row["forwards"] for row in recomputed.rows] == [row["forwards"] for row in rows.rows]


@pytest.mark.slow
def test_the_code_in_the_docs_runs(tmp_path, monkeypatch):
    write_pictures(tmp_path / "photos" / "train", {"blue": 9, "green": 9, "red": 8}, size=32)
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.S)[1]
    assert "snello.integrations.lightning" in code
    monkeypatch.chdir(tmp_path)
    exec(code, names := {"__name__": "docs"})
    assert names["trainer"].global_step == 3
    assert not any("forward" in vars(block) for block in names["module"].vit.blocks)
