"""Runs across a cut: what they leave behind, exact resume, the budget, the command line, sessions."""

import io
import itertools
import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import QUIET, assert_same_run, finetune, flags, resumed, rows_of, tiny_vit, with_method
from helpers.budgets import DROPPING
from helpers.halves import batch, make_cut, step
from helpers.resuming import cut_off, whole
from rich.console import Console

from snello import cli
from snello.codecs import codec_class
from snello.config import AlastConfig, EvaluateConfig, FinetuneConfig, PredictConfig, SplitConfig
from snello.config.registry import CODECS, GOALS
from snello.config.values import from_dict, to_dict
from snello.errors import AuthenticationError, CheckpointError, ConfigError
from snello.inference import evaluate, predict
from snello.models import create_model
from snello.runs.folder import RunFolder
from snello.split import flops as costs
from snello.split.local import LocalSession
from snello.split.security.auth import Anyone, Token, Tokens, hash_token
from snello.train.loop import Trainer
from snello.vit import ViT

FIELDS = {
    "uplink_bytes", "downlink_bytes", "uncompressed_bytes", "ratio", "eval_bytes", "jpeg_bytes",
    "client_flops_per_sample", "server_flops_per_sample", "client_seconds", "server_seconds", "cut", "codec",
}  # fmt: skip


@pytest.fixture
def split(small) -> FinetuneConfig:
    """`small` cut after block 2 of 6."""
    return replace(small, split=SplitConfig(cut=2, codec="adc(0.5)+int8"))


def with_codec(config: FinetuneConfig, codec: str, **options) -> FinetuneConfig:
    return replace(config, split=replace(config.split, codec=codec, **options))


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_a_run_without_compression_ends_as_the_whole_one(small, tmp_path, labels, accumulate, precision):
    config = replace(small, clip_norm=0.0, accumulate=accumulate, precision=precision)
    one = finetune(replace(config, out=tmp_path / "one"), QUIET)
    cut = finetune(with_codec(replace(config, split=SplitConfig(2)), "none", labels=labels, eval_codec="none"), QUIET)
    assert cut["ratio"] == 1 and cut["accuracy"] == one["accuracy"]
    for mine, theirs in zip(rows_of(config.out), rows_of(tmp_path / "one"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


@pytest.mark.slow
def test_summary_metrics_and_files(split, pictures):
    summary = finetune(replace(split, split=replace(split.split, link="1mbit/10ms")), QUIET)
    assert summary.keys() >= FIELDS and summary == json.loads((split.out / "summary.json").read_text())
    assert summary["jpeg_bytes"] == sum(path.stat().st_size for path in (pictures / "train").rglob("*.png"))
    steps = list(RunFolder(split.out).rows("step"))
    assert (
        summary["uplink_bytes"]
        == steps[-1]["uplink_bytes"]
        == sum(size for kind, size in summary["uplink_bytes_by_kind"].items() if kind != "evaluation")
    )
    assert summary["ratio"] == (summary["uplink_bytes"] + summary["downlink_bytes"]) / summary["uncompressed_bytes"]
    evaluations = rows_of(split.out, "eval")
    assert evaluations[-1]["training_bytes"] == summary["uplink_bytes"] + summary["downlink_bytes"]
    assert summary["link_seconds"] == pytest.approx(
        evaluations[-1]["training_bytes"] * 8 / 1e6 + len(steps) * 0.01, rel=1e-2
    )
    assert summary["eval_bytes"] > 0 and all("cluster_sizes" in row for row in steps[:6])
    assert (split.out / "traffic.png").stat().st_size > 1000
    assert "step_time_s" not in summary  # costs are those of the halves


@pytest.mark.parametrize("savings", [False, True])
def test_flops_of_both_sides_add_up_to_the_whole_model(small, savings):
    config = replace(small, split=SplitConfig(cut=2, codec="none"), exact_savings=savings)
    counted = costs.flops(config, "none", 3)
    from torch.utils.flop_counter import FlopCounterMode

    model = create_model("test_vit", "none", 3, 48)
    vit = ViT(model)
    vit.set_attention_paths(["explicit"] * vit.depth)
    vit.set_exact_savings(savings)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 3, 48, 48)).sum().backward()
    assert sum(counted) == pytest.approx(counter.get_total_flops() / 4, rel=1e-6)
    less = costs.flops(config, "adc(0.25)", 3)
    assert less[0] == pytest.approx(counted[0], rel=0.02)
    assert less[1] < 0.5 * counted[1]


CUT_OFF = {
    "adc": {"codec": "adc(0.5)"},
    "adc, u-shape": {"codec": "adc(0.5)+int4", "labels": "client"},
    "adc, merging tokens": {"codec": "adc(0.5, rule=merge)+int8"},
    "randtopk": {"codec": "randtopk(0.2)"},
    "bottlenet": {"codec": "bottlenet(0.5)"},
    "c3sl": {"codec": "c3sl(2)"},
    "fedlite": {"codec": "fedlite(8)"},
    "buffer": {"codec": "adc(0.5, buffer=2)"},
    "budget": {"codec": "adc(0.5)", "max_bytes": "150kB"},
    "counted only": {"codec": "adc(0.5)+int2", "frames": False},
    "pca": {"codec": "pca(1, basis=3)"},
    "pca, budget": {"codec": "pca(1, basis=3)", "max_bytes": "60kB"},
}


@pytest.mark.parametrize("name", CUT_OFF)
@pytest.mark.parametrize("method", ["full", "alast"])
@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(split, tmp_path, monkeypatch, name, method):
    options = dict(CUT_OFF[name])
    config = with_codec(split, options.pop("codec"), **options)
    config = with_method(config, method, accumulate=2, checkpoint_steps=1)
    other = whole(config, tmp_path / "whole")
    cut_off(config, monkeypatch, Trainer, "_backward", 6)
    torch.manual_seed(99)
    finetune(resumed(config), QUIET)
    assert_same_run(config.out, other)


@pytest.mark.slow
def test_the_budget_ends_the_run_wherever_the_epochs_are(split):
    budget = 90_000
    config = with_codec(replace(split, epochs=1), "adc(0.5)", max_bytes=f"{budget}B")
    summary = finetune(config, QUIET)
    sent = summary["uplink_bytes"] + summary["downlink_bytes"]
    assert budget * 0.7 < sent <= budget and summary["steps"] != 7
    evaluations = rows_of(config.out, "eval")
    assert evaluations[-1]["step"] == summary["steps"] and evaluations[-1]["training_bytes"] == sent
    longer = with_codec(replace(config, out=config.out.with_name("more")), "adc(0.5)", max_bytes="200kB")
    more = finetune(longer, QUIET)
    assert more["epochs"] >= 3 and more["uplink_bytes"] + more["downlink_bytes"] <= 2e5
    rates = [row["lr"] for row in rows_of(longer.out, "step")]
    assert rates[-1] < 0.05 * max(rates)  # the schedule is that of the budget


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("method", ["head", "alast"])
@pytest.mark.slow
def test_the_budget_knows_what_will_be_sent(split, labels, method):
    still = {"alast": AlastConfig(alpha=0.0)} if method == "alast" else {}
    config = with_codec(with_method(split, method, **still), "int8", labels=labels, max_bytes="300kB")
    summary = finetune(config, QUIET)
    assert 0.9 * 300_000 < summary["uplink_bytes"] + summary["downlink_bytes"] <= 300_000


@pytest.mark.slow
def test_where_steps_differ_in_bytes_the_learning_rate_goes_by_them(split):
    config = with_codec(split, "pca(1, basis=3)", max_bytes="100kB")
    summary = finetune(config, QUIET)
    assert 80_000 < summary["uplink_bytes"] + summary["downlink_bytes"] <= 100_000
    rows = rows_of(config.out, "step")
    assert len({b["uplink_bytes"] - a["uplink_bytes"] for a, b in itertools.pairwise(rows)}) > 3
    rates = [row["lr"] for row in rows]
    assert rates[-1] < 0.1 * max(rates) and rates.index(max(rates)) < len(rates) / 2


def test_a_budget_that_holds_no_step_is_refused(split):
    with pytest.raises(ConfigError, match=r"--split\.max-bytes 1kB is less than the \d+ bytes of one step"):
        finetune(with_codec(split, "none", max_bytes="1kB"), QUIET)
    with pytest.raises(ConfigError, match=r"--split\.max-bytes 1kB is less than the \d+ bytes that one step may take"):
        finetune(with_codec(split, "pca(1)", max_bytes="1kB"), QUIET)
    assert not split.out.exists()


@pytest.mark.parametrize("codec", ["adc(0.5)+int4", "bottlenet(0.5)", "pca(1)", "bottlenet(0.5)+pca(1)"])
@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.slow
def test_evaluate_gives_what_training_measured(split, pictures, codec, labels):
    summary = finetune(with_codec(split, codec, labels=labels), QUIET)
    result = evaluate(EvaluateConfig(run=split.out, workers=0))
    assert result["accuracy"] == summary["accuracy"]
    rows = list(predict(PredictConfig(run=split.out, paths=(pictures / "val" / "red",))))
    assert len(rows) == 3
    assert (split.out / "codec.safetensors").exists() == codec.startswith("bottlenet")


def test_auto_is_resolved_once(split):
    finetune(with_codec(split, "auto"), QUIET)
    saved, resolved = RunFolder(split.out).read()
    assert saved.split.codec == "auto" and resolved.codec == GOALS["auto"]


def test_a_small_last_batch_is_neither_lost_nor_nan(split):
    """26 pictures in batches of 5: the last has one."""
    text = Console(record=True, width=200, file=io.StringIO())
    for codec in ("adc(0.3)", "c3sl(4)"):
        out = split.out.with_name(codec)
        finetune(with_codec(replace(split, batch_size=5, out=out), codec), text)
        rows = rows_of(out, "step")
        assert len(rows) == 12 and all(torch.tensor(row["loss"]).isfinite() for row in rows)
    printed = text.export_text()
    assert printed.count("warning: ") == 1 and "leaves ADC nothing to merge" in printed


def test_method_auto_is_alast_alone_and_full_across_a_cut():
    assert FinetuneConfig().method_name == "alast"
    assert FinetuneConfig(split=SplitConfig(cut=3)).method_name == "full"
    assert FinetuneConfig(method="alast", split=SplitConfig(cut=3)).method_name == "alast"
    config = FinetuneConfig(split=SplitConfig(cut=3, codec="adc(0.1)", max_bytes="1MB", link="10mbit"))
    assert from_dict(FinetuneConfig, to_dict(config)) == config


def test_alast_across_a_cut_leaves_its_plot_and_state(split):
    config = replace(split, method="alast", alast=AlastConfig(**DROPPING | {"blocks": 4}, alpha=5.0))
    finetune(config, QUIET)
    state = json.loads((config.out / "alast.json").read_text())
    assert [len(state[side]["budgets"]) for side in ("client", "server")] == [2, 4]
    assert (config.out / "budgets.png").stat().st_size > 1000
    assert all(len(row["budgets"]) == 6 for row in rows_of(config.out, "step"))


BAD = {
    "--split.cut must be in 1..5 (the model's depth less 1), got 6": ["--split.cut", "6"],
    "--split.cut must be 0 or more, got -1": ["--split.cut", "-1"],
    "--split.codec: adc(0): ratio must be in (0, 1], got 0": ["--split.codec", "adc(0)"],
    "--split.codec: adc(1.5): ratio must be in (0, 1], got 1.5": ["--split.codec", "adc(1.5)"],
    "'adc(0.1+int8': '(' was never closed at the caret: adc^(0.1+int8": ["--split.codec", "adc(0.1+int8"],
    "unknown codec 'zip'; known: none, bf16": ["--split.codec", "zip"],
    "--split.eval-codec 'topk(1)': activations are evaluated in one number format": [
        "--split.eval-codec",
        "topk(1)",
    ],
    "--split.link must be a link as 10mbit/20ms": ["--split.link", "fast"],
    "--split.max-bytes must be an amount": ["--split.max-bytes", "much"],
    "--alast.rule merge does not go with --split.cut": ["--method", "alast", "--alast.rule", "merge"],
    "--alast.flops does not go with --split.cut": ["--method", "alast", "--alast.flops", "0.5"],
}


@pytest.mark.parametrize("told", BAD)
def test_what_cannot_be_used_is_one_line(split, capfd, told):
    args = flags(split)
    for name, value in zip(BAD[told][::2], BAD[told][1::2], strict=True):
        if name in args:
            args[args.index(name) + 1] = value
        else:
            args += [name, value]
    assert cli.main(["finetune", *args]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err, err
    assert not split.out.exists()


def test_values_that_no_codec_can_encode_stop_the_run_in_one_line(split, monkeypatch, capfd):
    monkeypatch.setattr("snello.vit.ViT.tokens", lambda self, x: self.model.forward_features(x) * float("nan"))
    assert cli.main(["finetune", *flags(split)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "the activations at the cut hold NaN" in line and "adc(0.5)+int8" in line and " at step 1;" in line
    assert line.count("try a lower --lr") == 1


def test_several_processes_are_refused(split, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        finetune(split, QUIET)
    assert not split.out.exists()


def test_a_split_setting_without_a_cut_is_refused(small, capfd):
    assert cli.main(["finetune", *flags(small), "--split.codec", "int8"]) == 2
    assert "--split.codec has no effect without --split.cut" in capfd.readouterr().err


def test_the_command_says_how_many_bytes_crossed(split, capfd):
    assert cli.main(["finetune", *flags(with_codec(split, "adc(0.5)"))]) == 0
    printed = capfd.readouterr().err
    assert re.search(r"epoch 2: accuracy .*, loss .*, 0\.\d+ MB", printed)
    assert "across the cut after block 2, codec adc(0.5)" in printed
    for line in ("up", "down", "training, both ways", "training uncompressed, fp32", "uploading the pictures once"):
        assert line in printed
    assert "x less traffic than uncompressed" in printed


class TestCodecs:
    def test_lists_every_codec_with_its_bytes(self, capsys):
        assert cli.main(["codecs", "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["codec"].partition("(")[0] for row in rows][: len(CODECS)] == list(CODECS)
        assert [row["codec"] for row in rows[-3:]] == list(GOALS) and rows[0]["ratio"] == 1
        assert all(row["uplink_bytes"] > 0 and row["downlink_bytes"] > 0 for row in rows)
        parts = {part["name"]: part for row in rows for part in row["parts"]}
        assert all(parts[name]["what"].endswith(".") and parts[name]["source"] for name in CODECS)
        assert "ratio, samples, tokens, min_cluster=1" in parts["adc"]["options"]

    def test_text(self, capsys):
        assert cli.main(["codecs", "adc(0.1)", "int4", "--batch-size", "8"]) == 0
        printed = capsys.readouterr().out
        assert "vit_micro_patch4_32 cut after block 3, batch 8" in printed
        assert "source: https://arxiv.org/abs/2509.15058" in printed and "bytes up" in printed

    @pytest.mark.parametrize("args", [["adc(0.1"], ["zip"], ["--cut", "12"], ["--model", "nothing"], ["adc()"]])
    def test_refusals(self, capfd, args):
        assert cli.main(["codecs", *args]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("snello: error: ")

    @pytest.mark.slow
    def test_a_reader_that_has_seen_enough(self):
        command = f"'{sys.executable}' -u -m snello.cli codecs --batch-size 8 | head -1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.stdout.startswith("Bytes of one exchange") and "Traceback" not in done.stderr

    def test_every_codec_has_a_source_and_an_example(self):
        for name in CODECS:
            assert codec_class(name).source


class TestSession:
    def test_runs_as_the_training_loop_does(self, split, tmp_path):
        other = replace(split, out=tmp_path / "other", eval_epochs=2)
        finetune(other, QUIET)
        session = LocalSession(replace(split, eval_epochs=2), console=QUIET)
        first = session.run(5)
        rest = session.run(100)
        assert (first["steps"], rest["steps"]) == (5, 9) and session.run(1)["steps"] == 0
        assert rows_of(split.out) == rows_of(other.out)
        rows = rows_of(split.out, "step")
        assert first["uplink_bytes"] + rest["uplink_bytes"] == rows[-1]["uplink_bytes"]
        assert first["loss"] == pytest.approx(sum(row["loss"] for row in rows[:5]) / 5)

    @pytest.mark.parametrize("codec", ["none", "bottlenet(0.5)"])
    def test_states_of_both_halves(self, split, codec):
        session = LocalSession(with_codec(split, codec), console=QUIET)
        client, server = session.get_state("client"), session.get_state("server")
        assert not client.keys() & server.keys()
        assert any(name.startswith("codec.") for name in client) == (codec != "none")
        session.run(3)
        assert not torch.equal(
            session.get_state("client")["blocks.0.attn.qkv.weight"], client["blocks.0.attn.qkv.weight"]
        )
        session.set_state("client", client)
        session.set_state("server", server)
        for side, state in (("client", client), ("server", server)):
            now = session.get_state(side)
            assert all(torch.equal(now[name], value) for name, value in state.items())
        assert session.run(1)["steps"] == 1

    def test_other_weights_are_refused_whole(self, split):
        session = LocalSession(split, console=QUIET)
        before = session.get_state("client")
        wrong = {name: value + 1 for name, value in before.items()}
        wrong["pos_embed"] = wrong["pos_embed"][:, :1]
        with pytest.raises(CheckpointError, match="client half: pos_embed"):
            session.set_state("client", wrong)
        with pytest.raises(CheckpointError, match="do not fit"):
            session.set_state("server", before)
        assert all(torch.equal(value, before[name]) for name, value in session.get_state("client").items())

    def test_who_is_admitted(self, split):
        server = Tokens({"ann": hash_token("secret")})
        for credentials in (Token("ann", "guess"), Token("bob", "secret"), Anyone()):
            with pytest.raises(AuthenticationError, match="not admit"):
                LocalSession(split, credentials, server, QUIET)
        assert not split.out.exists()
        LocalSession(split, Token("ann", "secret"), server, QUIET)

    def test_needs_a_cut(self, small):
        with pytest.raises(ConfigError, match="needs a cut"):
            LocalSession(small)


def test_adc_on_a_model_without_cls_token():
    cut = make_cut(tiny_vit(class_token=False, global_pool="avg"), "adc(0.3)")
    assert step(cut, [batch(8)]).isfinite()
    with pytest.raises(Exception, match="score=cls needs a CLS token"):
        step(make_cut(tiny_vit(class_token=False, global_pool="avg"), "adc(0.3, score=cls)"), [batch(8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(make_cut(tiny_vit(reg_tokens=3), "adc(0.3, score=received)"), [batch(8)]).isfinite()
