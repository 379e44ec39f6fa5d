"""A cut model is the whole model: same loss, same gradients, same weights; and what its halves tell each other."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import tiny_deit, tiny_vit
from helpers.budgets import DROPPING
from helpers.halves import CLASSES, CPU, LR, Cut, batch, make_cut, step
from helpers.vits import VARIANTS, make
from torch import nn
from torch.nn.functional import cross_entropy

from snello.config import AlastConfig, FinetuneConfig, SplitConfig
from snello.errors import ConfigError, ProtocolError, TrainingError
from snello.methods.alast import AlastMethod
from snello.seeds import mix
from snello.split.labels import Targets
from snello.split.wire.frames import ARRAY_KINDS, Flags, Frame, Kind
from snello.train.learner import CODEC
from snello.train.optim import make_optimizer, set_lr
from snello.vit import ViT


def whole_steps(
    model: nn.Module, precision: str, steps: int, eps: float = 1e-8, savings: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Losses of a plain training loop on the model in one piece, and the gradients of its first step."""
    ViT(model).set_exact_savings(savings)
    optimizer = make_optimizer(ViT(model), lr=LR, weight_decay=0.05, device=CPU)
    set_eps(optimizer, eps)
    losses: list[torch.Tensor] = []
    gradients: list[torch.Tensor | None] = []
    for index in range(steps):
        images, labels = batch(seed=index)
        torch.manual_seed(index)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss = cross_entropy(logits.float(), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients = gradients or [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        set_lr(optimizer, LR)
        optimizer.step()
    return losses, gradients


def set_eps(optimizer: torch.optim.Optimizer, eps: float) -> None:
    for group in optimizer.param_groups:
        group["eps"] = eps


@pytest.mark.parametrize("savings", [False, True])
@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stochastic"])
def test_without_compression_a_cut_model_is_the_whole_model(variant, labels, savings):
    whole = make(variant)
    model = copy.deepcopy(whole)
    # Average pooling alone rounds differently at the cut; Adam would make full steps of what is nothing but rounding.
    eps = 1e-2 if variant == "no-cls" else 1e-8
    losses, gradients = whole_steps(whole, "fp32", 5, eps, savings)
    cut = make_cut(model, cut=1 if labels == "server" else 3, labels=labels, exact_savings=savings)
    for optimizer in cut.optimizers.values():
        set_eps(optimizer, eps)
    for index, expected in enumerate(losses):
        loss = step(cut, [batch(seed=index)], index, update=False)
        if index == 0:
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                assert_close(p.grad, gradient, name)
        cut.learner.clip(0.0)
        cut.learner.update(LR)
        assert_close(loss, expected, "loss")
    for (name, value), (_, other) in zip(model.state_dict().items(), whole.state_dict().items(), strict=True):
        assert_close(value, other, name)


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("frames", [True, False])
@pytest.mark.parametrize("savings", [True, False])
def test_in_bf16_too_and_with_frames_off(cut, labels, frames, savings):
    whole = make("layerscale")
    model = copy.deepcopy(whole)
    losses, _ = whole_steps(whole, "bf16", 3, savings=savings)
    halves = make_cut(model, cut=cut, labels=labels, frames=frames, precision="bf16", exact_savings=savings)
    for index, expected in enumerate(losses):
        assert_close(step(halves, [batch(seed=index)], index), expected, "loss")
    for (name, value), (_, other) in zip(model.state_dict().items(), whole.state_dict().items(), strict=True):
        assert_close(value, other, name)


def assert_close(value: torch.Tensor, other: torch.Tensor | None, name: str) -> None:
    if value is None or other is None:
        assert value is other, name
        return
    assert (value - other).abs().max() <= 1e-6 * other.abs().max().clamp_min(1e-6), name


@pytest.mark.parametrize("checkpointing", ["client", "server"])
def test_with_gradient_checkpointing(checkpointing):
    whole = make("layerscale")
    model = copy.deepcopy(whole)
    expected, _ = whole_steps(whole, "fp32", 2)
    cut = make_cut(model, "none")
    getattr(cut, checkpointing).vit.model.set_grad_checkpointing(True)
    losses = [step(cut, [batch(seed=index)], index) for index in range(2)]
    assert_close(torch.stack(losses), torch.stack(expected), "losses")


@pytest.mark.parametrize("labels", ["server", "client"])
def test_every_parameter_is_in_exactly_one_half(labels):
    model = tiny_deit()
    cut = make_cut(model, labels=labels)
    client, server = ({id(p) for p in half.parameters()} for half in (cut.client, cut.server))
    assert not client & server and client | server == {id(p) for p in model.parameters()}
    head = {id(p) for name, p in model.named_parameters() if name.startswith("head")}
    assert head <= (server if labels == "server" else client)
    names = [set(half.vit.model.state_dict()) for half in (cut.client, cut.server)]
    assert not names[0] & names[1] and names[0] | names[1] == set(model.state_dict())


@pytest.mark.parametrize("cut", [0, 4, 5])
def test_a_cut_outside_the_model_is_refused(cut):
    with pytest.raises(ConfigError, match=r"^cut must be in 1\.\.3 .*got"):
        ViT(tiny_vit()).cut(cut)


def frames_of(cut: Cut, batches) -> list[Frame]:
    return cut.frames(lambda: step(cut, batches))


CODECS = (
    "none",
    "adc(0.3)",
    "adc(0.3)+int4",
    "adc(0.3, rule=merge)",
    "int2",
    "topk(0.1)",
    "c3sl(3)",
    "bottlenet(0.5)",
    "fedlite(8)",
)


@pytest.mark.parametrize("codec", CODECS)
def test_labels_never_leave_the_client_in_u_shape(codec):
    cut = make_cut(tiny_vit(), codec, labels="client")
    frames = frames_of(cut, [batch(8)])
    assert [frame.kind for frame in frames] == [
        Kind.ACTIVATIONS, Kind.FEATURES, Kind.FEATURE_GRADIENTS, Kind.GRADIENTS,
    ]  # fmt: skip
    names = {name for frame in frames for name in frame.arrays}
    assert not any(name.startswith("labels") for name in names) and "gradients.loss" not in names
    assert cut.counters.uplink["labels"] == cut.counters.downlink["labels"] == 0
    assert frames[1].arrays["activations"].shape[-1] == 32  # features only: no tokens come down
    assert not any(name.startswith("head") for name in cut.server.vit.model.state_dict())


@pytest.mark.parametrize("codec", CODECS)
def test_every_frame_is_counted_by_kind(codec):
    cut = make_cut(tiny_vit(), codec)
    frames = frames_of(cut, [batch(8)])
    assert [frame.kind for frame in frames] == [Kind.ACTIVATIONS, Kind.GRADIENTS]
    written = sum(value.numel() * value.element_size() for frame in frames for value in frame.arrays.values())
    counted = sum(n for side in (cut.counters.uplink, cut.counters.downlink) for k, n in side.items() if k != "headers")
    assert written == counted and cut.counters.uplink["headers"] > 0
    assert {name.split(".")[0] for frame in frames for name in frame.arrays} <= set(ARRAY_KINDS)
    assert cut.learner.traffic()["uplink_bytes"] == cut.counters.total("uplink")
    if codec == "none":
        assert cut.learner.traffic()["ratio"] == 1


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_trains_both_halves(codec, labels):
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cut = make_cut(model, codec, labels=labels, label_smoothing=0.0)
    batches = [batch(8)]
    losses = [float(step(cut, batches, index)) for index in range(12)]
    assert all(torch.tensor(losses).isfinite()) and min(losses[-3:]) < losses[0]
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_frozen_client_gets_no_gradient(labels):
    cut = make_cut(tiny_vit(), "adc(0.3)", labels=labels, method="head")
    frames = frames_of(cut, [batch(8)])
    assert Flags.FORWARD_ONLY in frames[0].flags
    assert all("gradients" not in frame.arrays for frame in frames)
    assert len(frames) == 2  # in U-shape nothing below the classifier trains either
    assert cut.ledger.uncompressed < 8 * 17 * 32 * 4 * 1.1  # the reference is the same training: it sends none either


def test_soft_labels_are_exact_and_stay_in_order():
    labels, groups = torch.tensor([0, 1, 1, 4, 0]), torch.tensor([1, 0, 1, 1, 0])
    targets = Targets.of(labels, groups, 2, CLASSES)
    assert torch.equal(targets.sizes, torch.tensor([2.0, 3.0]))
    expected = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 1]]) / torch.tensor([[2.0], [3.0]])
    assert torch.equal(targets.values, expected)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_rows_weigh_alike_or_by_their_sizes(labels):
    """The loss of merged rows, written out."""
    for weight in ("rows", "sizes"):
        cut = make_cut(tiny_vit(), f"adc(samples=0.5, tokens=1, weight={weight})", labels=labels, label_smoothing=0.0)
        images, classes = batch(8)
        loss = step(cut, [(images, classes)], update=False)
        cut.begin()
        frame = cut.client.start([(images, classes)], step=0, micro=0, num_samples=8, seed=mix(0, CODEC, 0))
        groups = cut.client._pending.message.groups
        targets = Targets.of(classes, groups, int(groups.max()) + 1, CLASSES)
        with torch.no_grad():
            z = cut.codec.decode(frame.arrays, with_gradient=False).z
            features = cut.server.vit.features(cut.server.vit.tokens(z))
            logits = (cut.server if labels == "server" else cut.client).vit.head(features)
            losses = -(targets.values * logits.log_softmax(1)).sum(1)
        weights = targets.sizes / 8 if weight == "sizes" else torch.full_like(losses, 1 / len(losses))
        assert torch.allclose(loss, (losses * weights).sum(), atol=1e-5)


def test_a_buffer_merges_over_several_forward_passes(monkeypatch):
    small = [(images[None], labels[None]) for images, labels in zip(*batch(8), strict=True)]
    buffered, other = (make_cut(tiny_vit(), "adc(samples=0.5, tokens=0.5, buffer=8)") for _ in range(2))
    assert buffered.buffer == 8
    frames = frames_of(other, small)
    assert len(frames) == 2 and frames[0].arrays["activations"].shape[0] == 4
    at_once = make_cut(tiny_vit(), "adc(samples=0.5, tokens=0.5)")
    for cut, batches in ((buffered, small), (at_once, [batch(8)])):
        step(cut, batches, 1, update=False)
    pairs = zip(buffered.vit.model.named_parameters(), at_once.vit.model.parameters(), strict=True)
    assert all(torch.allclose(p.grad, other.grad, atol=1e-4) for (_, p), other in pairs)


@pytest.mark.parametrize("codec", ["none", "adc(0.3)", "adc(samples=1, tokens=0.4)+int4", "topk(0.2)", "c3sl(3)"])
@pytest.mark.parametrize("where", ["client", "server", "both"])
def test_alast_inside_a_cut(codec, where):
    alast = AlastConfig(blocks=2, start_budget=0.7, min_budget=0.2, alpha=1e-3)
    config = FinetuneConfig(
        method="alast", alast=alast, lr=LR, warmup=0.0, split=SplitConfig(cut=2, codec=codec, alast=where)
    )
    cut = Cut(tiny_vit(), config)
    for index in range(3):
        assert step(cut, [batch(8, seed=index)], index).isfinite()
    attached = [isinstance(half.method, AlastMethod) for half in (cut.client, cut.server)]
    assert attached == [where != "server", where != "client"]
    metrics = cut.learner.metrics()
    assert len(metrics["budgets"]) == 4
    still = {"client": [2, 3], "server": [0, 1], "both": []}[where]
    assert all(metrics["budgets"][block] == 1.0 and block in metrics["trained"] for block in still)
    moved = [block for block in range(4) if metrics["budgets"][block] != 1.0]
    assert moved == [block for block in range(4) if block not in still]
    assert len(metrics["trained"]) == {"client": 3, "server": 3, "both": 2}[where]


def test_tokens_dropped_on_the_client_shorten_what_is_sent():
    config = FinetuneConfig(
        method="alast",
        alast=AlastConfig(**DROPPING | {"start_budget": 0.5}),
        split=SplitConfig(cut=2, codec="none", alast="client"),
    )
    cut = Cut(tiny_vit(), config)
    step(cut, [batch(8)])
    assert cut.counters.uplink["activations"] == 8 * (1 + 4) * 32 * 4  # 16 patches, 8 after the first block, then 4
    assert cut.learner.traffic()["ratio"] < 0.4  # of all tokens


def test_evaluation_is_counted_apart_and_drops_nothing():
    cut = make_cut(tiny_vit(), "adc(0.1)+int2", eval_codec="int8")
    cut.evaluator.eval()
    images, _ = batch(6)
    with torch.no_grad():
        logits = cut.evaluator(images)
        expected = cut.vit.model.eval()(images)
    assert logits.shape == expected.shape and (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert cut.counters.training == 0 and cut.counters.evaluation > 6 * 17 * 32
    exact = make_cut(tiny_vit(), "adc(0.1)", eval_codec="none")
    exact.evaluator.eval()
    with torch.no_grad():
        assert torch.equal(exact.evaluator(images), expected)


def test_metrics_of_a_step():
    cut = make_cut(tiny_vit(), "adc(0.3)", link="8kbit/1s")
    step(cut, [batch(8)])
    first = cut.learner.metrics()
    step(cut, [batch(8)], 1)
    second = cut.learner.metrics()
    sent = first["uplink_bytes"] + first["downlink_bytes"]
    assert second["uplink_bytes"] == 2 * first["uplink_bytes"]
    assert first["link_seconds"] == pytest.approx(sent / 1000 + 1, abs=1e-3) == second["link_seconds"]
    assert first["client_seconds"] > 0 and first["server_seconds"] > 0
    assert sum(int(size) * num for size, num in second["cluster_sizes"].items()) == 8
    assert "cluster_sizes" not in cut.learner.metrics()  # nothing was exchanged since


def test_nan_is_refused_before_anything_is_sent():
    model = tiny_vit()
    cut = make_cut(model, "adc(0.3)+int4")
    with torch.no_grad():
        model.cls_token.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"activations at the cut.*adc\(0\.3\)\+int4"):
        step(cut, [batch()])
    assert cut.counters.training == 0
    model = tiny_vit()
    cut = make_cut(model, "none")
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="gradients at the cut"):
        step(cut, [batch()])


class TestHalfPrecision:
    """The scaler's logic, on a CPU: only the scale is special there, forward passes are in fp32."""

    def cut(self, monkeypatch, labels: str) -> Cut:
        monkeypatch.setattr("snello.split.halves.autocast", lambda *args: torch.autocast("cpu", enabled=False))
        return make_cut(tiny_vit(), "none", precision="fp16", labels=labels)

    @pytest.mark.parametrize("labels", ["server", "client"])
    def test_the_scale_cancels_out(self, monkeypatch, labels):
        scaled = self.cut(monkeypatch, labels)
        plain = make_cut(tiny_vit(), "none", labels=labels)
        for index in range(3):
            loss, expected = (step(cut, [batch(seed=index)], index) for cut in (scaled, plain))
            assert_close(loss, expected, "loss")
        assert scaled.learner.half.scale() == 65536
        pairs = zip(scaled.vit.model.state_dict().items(), plain.vit.model.state_dict().values(), strict=True)
        for (name, value), other in pairs:
            assert torch.allclose(value, other, atol=1e-4), name

    @pytest.mark.parametrize("labels", ["server", "client"])
    def test_a_half_that_trains_nothing_keeps_its_scale(self, monkeypatch, labels):
        """With the head alone, one half has no gradients at all."""
        monkeypatch.setattr("snello.split.halves.autocast", lambda *args: torch.autocast("cpu", enabled=False))
        cut = make_cut(tiny_vit(), "none", precision="fp16", labels=labels, method="head")
        for index in range(2):
            step(cut, [batch(seed=index)], index)
        assert cut.client.scale() == cut.server.scale() == 65536

    @pytest.mark.parametrize("labels", ["server", "client"])
    @pytest.mark.parametrize("where", ["client", "server"])
    def test_an_overflow_in_either_half_skips_the_step_in_both(self, monkeypatch, labels, where):
        cut = self.cut(monkeypatch, labels)
        before = {name: value.clone() for name, value in cut.vit.model.state_dict().items()}
        block = cut.vit.blocks[0 if where == "client" else 3]
        handle = block.norm1.weight.register_hook(lambda grad: grad * float("inf"))
        step(cut, [batch()])
        for name, value in cut.vit.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert cut.learner.half.scale() == 32768
        handle.remove()
        step(cut, [batch()], 1)
        assert not torch.equal(cut.vit.model.patch_embed.proj.weight, before["patch_embed.proj.weight"])
        assert not torch.equal(cut.vit.model.norm.weight, before["norm.weight"])

    @pytest.mark.parametrize("labels", ["server", "client"])
    def test_an_overflowing_gradient_at_the_cut_is_not_sent(self, monkeypatch, labels):
        cut = self.cut(monkeypatch, labels)
        real = cut.server.vit.tokens
        monkeypatch.setattr(cut.server.vit, "tokens", lambda z, sizes: real(_Overflow.apply(z), sizes))
        frames = frames_of(cut, [batch()])
        assert Flags.OVERFLOW in frames[-1].flags and "gradients" not in frames[-1].arrays
        assert cut.learner.half.scale() == 32768


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class TestOutOfTurn:
    def test_frames_that_do_not_belong_to_the_exchange(self):
        cut = make_cut(tiny_vit(), labels="client")
        cut.begin()
        frame = cut.client.start([batch()], step=3, micro=1, num_samples=4, seed=0)
        with pytest.raises(ProtocolError, match="out of turn"):
            cut.server.answer(Frame(Kind.FEATURE_GRADIENTS, 3, 1, {}))
        features = cut.server.answer(frame)
        with pytest.raises(ProtocolError, match=r"step 2\.1"):
            cut.client.answer(replace(features, step=2))
        with pytest.raises(ProtocolError, match="kind EVALUATED"):
            cut.client.answer(replace(features, kind=Kind.EVALUATED))
        gradients = cut.client.answer(features)
        assert gradients is not None
        with pytest.raises(ProtocolError, match=r"step 3\.2"):
            cut.server.answer(replace(gradients, micro=2))
        assert cut.client.answer(cut.server.answer(gradients)) is None
        with pytest.raises(ProtocolError, match="not under way"):
            cut.client.answer(features)

    def test_labels_that_are_missing_or_wrong(self):
        cut = make_cut(tiny_vit())
        cut.begin()
        frame = cut.client.start([batch()], step=0, micro=0, num_samples=4, seed=0)
        for name, value in (("labels", torch.tensor([9, 0, 0, 0], dtype=torch.uint8)), ("labels", None)):
            arrays = (
                {**frame.arrays, name: value}
                if value is not None
                else {key: array for key, array in frame.arrays.items() if not key.startswith("labels")}
            )
            with pytest.raises(ProtocolError, match="labels"):
                cut.server.answer(replace(frame, arrays=arrays))
