"""What is found out about a run: patch by patch as in its training, whatever method, model and cut it has."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import QUIET, finetune, small_config, write_pictures
from helpers.budgets import DROPPING
from helpers.run_folders import edit, make_transformers
from PIL import Image

from snello.config import AlastConfig, SplitConfig
from snello.data import splits_of
from snello.explain import explain
from snello.explain.run import Run
from snello.files import load_tensors, save_tensors
from snello.inference import Predictor
from snello.methods.alast import AlastMethod
from snello.runs.folder import RunFolder

MERGING = AlastConfig(token_multiple=1, alpha=0.0)  # half of the tokens, and half of those


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """Trains a run of the settings, once; explained in a copy of its own."""
    made = {}

    def train(name, **settings):
        if name not in made:
            config = replace(small_config(pictures), epochs=1, out=tmp_path_factory.mktemp(name) / "run", **settings)
            finetune(config, QUIET)
            shutil.rmtree(config.out / "report", ignore_errors=True)
            made[name] = config.out
        copy = tmp_path_factory.mktemp(name) / "run"
        shutil.copytree(made[name], copy)
        return copy

    return train


def part(run, name):
    return json.loads((run / "report" / f"{name}.json").read_text())


def explained(run, name="pictures"):
    assert explain(run) == []
    return part(run, name)


def predict(run):
    """What the model says of each held-out picture, and its label."""
    config = RunFolder(run).read()[0]
    held_out, predictor = splits_of(config).val, Predictor(run, "cpu")
    images = torch.stack([predictor.transform(held_out.open(i)) for i in range(len(held_out))])
    return predictor.probabilities(images), held_out


def write_predictions(run, wrong=(), sure=lambda index: 0.5 + index / 100):
    """A predictions.jsonl in which the pictures `wrong` are taken for the class after their own."""
    held_out, rows = Run(run).held_out, []
    for index, label in enumerate(held_out.labels):
        said = (label + 1) % 3 if index in wrong else label
        top = [[said, sure(index)], [(said + 1) % 3, 0.1]]
        rows.append({"index": index, "name": held_out.name(index), "label": label, "predicted": said, "top": top,
                     "p": 0.1})  # fmt: skip
    (run / "report").mkdir(exist_ok=True)
    (run / "report" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --------------------------------------------------------------------------------------------------------- the pictures


def test_patches_are_shown_as_the_run_would_drop_them(trained):
    """With the budgets of alast.json, in a forward pass in training mode of the weights that were kept."""
    run = trained("drop", method="alast", alast=AlastConfig(**DROPPING, alpha=5.0))
    values = explained(run)
    state, folder = json.loads((run / "alast.json").read_text()), RunFolder(run)
    assert values["budgets"] == state["budgets"] != [0.9] * 6 and values["trained"] == state["trained"]
    assert (values["rule"], values["drop_at"], values["method"]) == ("drop", "mid", "alast")
    assert values["grid"] == [3, 3] and values["depth"] == 6 and values["cut"] is values["codec"] is None
    config = folder.read()[0]
    vit = folder.model()
    vit.model.load_state_dict(load_tensors(folder.model_file)[0])
    alast = AlastMethod(vit, config)
    alast.load_state_dict(state)
    predictor, held_out = Predictor(run, "cpu"), splits_of(config).val
    assert len(values["pictures"]) == 8
    for picture in values["pictures"]:
        x = predictor.normalize(predictor.transform(held_out.open(picture["index"]))[None])
        vit.model.train()(x)
        left = list(range(9))
        kept = iter(sorted(vit.context.kept.items()))
        for change in picture["blocks"]:
            block, index = next(kept)
            left = [left[i] for i in (index[0, 1:] - 1).tolist()]
            expected = [left.index(patch) if patch in left else -1 for patch in range(9)]
            assert change == {"block": block, "tokens": len(left), "groups": expected}
        assert next(kept, None) is None and len(left) < 9 and picture["crosses"] is None


def test_pictures_come_with_names_classes_and_files(trained):
    run = trained("merge", method="alast", alast=MERGING)
    values, (probabilities, held_out) = explained(run), predict(run)
    assert values["rule"] == "merge-even" and values["version"] == 1 and values["split"] == "held out"
    for picture in values["pictures"]:
        index = picture["index"]
        assert picture["name"] == held_out.name(index)
        assert picture["label"] == held_out.classes[held_out.labels[index]]
        best = probabilities[index].max(0)
        assert picture["predicted"] == held_out.classes[best.indices]
        assert picture["probability"] == pytest.approx(best.values.item(), abs=1e-4)
        assert [(change["block"], change["tokens"]) for change in picture["blocks"]] == [(0, 4), (1, 2)]
        assert {len(change["groups"]) for change in picture["blocks"]} == {9}
        with Image.open(run / "report" / picture["image"]) as image:
            assert image.format == "JPEG" and image.size == (48, 48)
            shown = image.convert("RGB").resize((1, 1)).getpixel((0, 0))
        own = held_out.open(index).resize((1, 1)).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(shown, own, strict=True)) < 12


def test_half_of_them_are_mistakes_of_as_many_classes_as_can_be(trained):
    run = trained("full")
    for wrong, num in (({0, 1, 2, 4, 7}, 4), ({0, 3}, 2), (set(), 0), (set(range(8)), 7)):
        write_predictions(run, wrong)
        shown = explained(run)["pictures"]
        mistaken = [picture for picture in shown if picture["label"] != picture["predicted"]]
        assert len({picture["index"] for picture in shown}) == 8 and len(mistaken) == num
        assert {picture["index"] for picture in mistaken} <= wrong
        counts = [[picture["label"] for picture in shown].count(name) for name in ("blue", "green", "red")]
        assert sorted(counts) == [2, 3, 3]
        assert explained(run)["pictures"] == shown


def test_methods_without_budgets_change_nothing(trained):
    values = explained(trained("full"))
    assert [values[name] for name in ("rule", "drop_at", "budgets", "trained")] == [None] * 4
    assert all(picture["blocks"] == [] for picture in values["pictures"]) and values["method"] == "full"


def test_adapters_are_merged_and_budgets_are_there(trained):
    pytest.importorskip("peft")
    run = trained("lora", method="alast+lora", alast=MERGING)
    assert [change["tokens"] for change in explained(run)["pictures"][0]["blocks"]] == [4, 2]


def test_budgets_that_were_scaled_to_a_target_are_those_of_the_last_step(trained):
    run = trained("target", method="alast", alast=replace(MERGING, flops=0.5))
    scaled = json.loads((run / "alast.json").read_text())["target"]["scaled"]
    assert explained(run)["budgets"] == [*scaled[:2], 1.0, 1.0, 1.0, 1.0]


def test_a_tail_with_all_tokens_does_not_hide_what_was_before(trained):
    run = trained("tail", method="alast", alast=replace(MERGING, full_tail=0.5))
    assert [change["tokens"] for change in explained(run)["pictures"][0]["blocks"]] == [4, 2]


def test_without_alast_json_the_last_step_that_was_logged_says_the_budgets(trained):
    run = trained("drop", method="alast", alast=AlastConfig(**DROPPING, alpha=5.0))
    expected = explained(run)
    (run / "alast.json").unlink()
    assert explained(run) == expected


def test_a_model_of_transformers_with_a_distillation_token(tmp_path, pictures):
    pytest.importorskip("transformers")
    model = make_transformers(tmp_path / "model", "DeiT")
    config = replace(small_config(pictures), model=str(model), image_size=None, out=tmp_path / "run")
    finetune(replace(config, epochs=1, method="alast", alast=MERGING), QUIET)
    values = explained(tmp_path / "run")
    assert values["grid"] == [4, 4] and [c["tokens"] for c in values["pictures"][0]["blocks"]] == [8, 4]


def test_a_model_that_averages_patches(tmp_path, pictures):
    pytest.importorskip("transformers")
    model = make_transformers(tmp_path / "model", "Dinov2", num_register_tokens=0)
    config = replace(small_config(pictures), model=str(model), image_size=None, out=tmp_path / "run")
    finetune(replace(config, epochs=1, method="alast", alast=AlastConfig(token_multiple=1)), QUIET)
    values = explained(tmp_path / "run")
    assert values["rule"] == "drop" and -1 in values["pictures"][0]["blocks"][-1]["groups"]


# ------------------------------------------------------------------------------------------------------- across a cut


def test_dropped_and_averaged_at_the_cut(trained):
    codec = "adc(samples=0.3, tokens=0.6)"
    run = trained("adc", split=SplitConfig(cut=3, codec=codec), batch_size=9)
    values = explained(run)
    assert values["cut"] == 3 and values["codec"] == codec and values["budgets"] is None
    groups = {}
    for picture in values["pictures"]:
        crossed = picture["crosses"]
        assert picture["blocks"] == [] and crossed["tokens"] == 5 and "error" not in crossed
        assert sorted(crossed["groups"]) == [*[-1] * 4, 0, 1, 2, 3, 4]
        groups.setdefault(tuple(crossed["groups"]), []).append(picture)
        assert crossed["note"].startswith("5 of 9 patch tokens, ")
    assert len(groups) <= 2  # as those that are averaged keep the same patches
    found = part(run, "merged")
    assert found["batch"] == 9 and found["codec"] == codec and len(found["groups"]) in (1, 2)
    held_out = Run(run).held_out
    assert [len(group["indices"]) for group in found["groups"]] == sorted(
        (len(group["indices"]) for group in found["groups"]), reverse=True
    )
    for group in found["groups"]:
        assert group["names"] == [held_out.name(i) for i in group["indices"]]
        assert group["labels"] == [held_out.classes[held_out.labels[i]] for i in group["indices"]]
        assert all((run / "report" / image).is_file() for image in group["images"])
        shown = [p["crosses"] for p in values["pictures"] if p["index"] in group["indices"]]
        assert len({tuple(crossed["groups"]) for crossed in shown}) <= 1
        assert all(f"averaged with {group['size'] - 1} other picture" in crossed["note"] for crossed in shown)


def test_merged_tokens_at_the_cut_go_on_as_one(trained):
    """The client drops, the codec merges pairs, and the server merges what comes."""
    run = trained(
        "both", method="alast", image_size=96,  # 36 patches
        alast=replace(MERGING, start_budget=0.8),
        split=SplitConfig(cut=3, codec="adc(samples=1, tokens=0.7, rule=merge)+int8"),
    )  # fmt: skip
    values = explained(run)
    assert values["rule"] == "drop" and len(values["budgets"]) == 6 and values["trained"] == list(range(6))
    for picture in values["pictures"]:
        crossed = picture["crosses"]["groups"]
        below = [c for c in picture["blocks"] if c["block"] < 3]
        above = [c for c in picture["blocks"] if c["block"] >= 3]
        assert below and above and "error" not in picture["crosses"]
        chain = [list(range(36)), *(c["groups"] for c in below), crossed, *(c["groups"] for c in above)]
        for old, new in pairwise(chain):
            assert all(b == -1 for a, b in zip(old, new, strict=True) if a == -1)  # what is gone stays gone
            pairs = {(a, b) for a, b in zip(old, new, strict=True) if a >= 0}
            assert len({a for a, _ in pairs}) == len(pairs)  # patches of one token stay together
        assert max(crossed) + 1 == picture["crosses"]["tokens"] < max(below[-1]["groups"]) + 1
    assert not (run / "report" / "merged.json").exists()


@pytest.mark.parametrize(("codec", "low", "high"), [("none", 0, 0), ("int4", 0.001, 0.2), ("topk(0.1)", 0.3, 1.1)])
def test_codecs_that_send_all_tokens_say_how_well(trained, codec, low, high):
    run = trained(codec, split=SplitConfig(cut=2, codec=codec))
    for picture in explained(run)["pictures"]:
        crossed = picture["crosses"]
        assert crossed["tokens"] == 9 and crossed["groups"] == list(range(9))
        assert all(low <= error <= high for error in crossed["error"]) and len(crossed["error"]) == 9


def test_a_codec_with_weights_of_its_own(trained):
    run = trained("bottlenet", split=SplitConfig(cut=2, codec="bottlenet(0.5)"))
    assert all(picture["crosses"]["tokens"] == 9 for picture in explained(run)["pictures"])


def test_errors_are_of_the_tokens_that_the_client_kept(trained):
    run = trained(
        "kept", method="alast", alast=AlastConfig(**DROPPING, alpha=0.0), split=SplitConfig(cut=3, codec="int4")
    )
    crossed = explained(run)["pictures"][0]["crosses"]
    assert [error is None for error in crossed["error"]] == [group == -1 for group in crossed["groups"]]
    assert None in crossed["error"]


def test_with_the_server_elsewhere_the_client_half_is_shown(trained):
    codec = "adc(samples=1, tokens=0.6)"
    run = trained(
        "join", method="alast", alast=AlastConfig(**DROPPING, alpha=0.0), split=SplitConfig(cut=3, codec=codec)
    )
    whole = explained(run)
    shutil.rmtree(run / "report")
    vit = RunFolder(run).model()
    own = vit.cut(3)[0].model.state_dict()
    save_tensors(
        run / "model.safetensors", {k: v for k, v in load_tensors(run / "model.safetensors")[0].items() if k in own}
    )
    edit(run, {"server": {"address": "127.0.0.1:1", "session": "x"}})
    state, summary = (json.loads((run / name).read_text()) for name in ("alast.json", "summary.json"))
    (run / "alast.json").write_text(json.dumps({"client": state["client"]}))
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if "flops" not in k}))
    problems = explain(run)
    assert len(problems) == 1 and "is on a server" in problems[0] and not (run / "report" / "flops.json").exists()
    values = part(run, "pictures")
    assert values["budgets"][:3] == whole["budgets"][:3] and values["depth"] == 6
    by_index = {picture["index"]: picture for picture in whole["pictures"]}
    common = [picture for picture in values["pictures"] if picture["index"] in by_index]
    assert common
    for picture in common:
        expected = by_index[picture["index"]]
        assert picture["blocks"] == [c for c in expected["blocks"] if c["block"] < 3]
        assert picture["crosses"] == expected["crosses"]
        assert picture["predicted"] is picture["probability"] is None


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_the_surest_mistakes_and_the_least_sure_of_the_others(trained):
    run = trained("full")
    write_predictions(run, wrong={1, 4, 8})
    values = explained(run, "mistakes")
    assert [row["index"] for row in values["wrong"]] == [8, 4, 1] and values["pictures"] == 9
    assert [row["index"] for row in values["unsure"]] == [0, 2, 3, 5, 6, 7]
    classes = ("blue", "green", "red")
    for row in values["wrong"]:
        assert (row["label_name"], row["predicted_name"]) == (classes[row["label"]], classes[row["predicted"]])
        with Image.open(run / "report" / row["image"]) as image:
            assert image.format == "JPEG" and image.size == (16, 16)  # as large as it is


def test_what_was_not_noted_in_training_is_asked_of_the_model(trained):
    run = trained("full")
    (probabilities, held_out), rows = predict(run), explained(run, "mistakes")
    wrong = [i for i, label in enumerate(held_out.labels) if probabilities[i].argmax() != label]
    assert sorted(row["index"] for row in rows["wrong"]) == wrong and rows["pictures"] == 9
    for row in rows["wrong"] + rows["unsure"]:
        assert row["p"] == pytest.approx(probabilities[row["index"], row["label"]].item(), abs=1e-4)
        assert [p for _, p in row["top"]] == sorted((p for _, p in row["top"]), reverse=True)


def test_large_pictures_make_small_files(tmp_path, pictures):
    data = write_pictures(tmp_path / "data", {"a": 6, "b": 6}, size=300)
    config = replace(small_config(data), epochs=1, image_size=256, out=tmp_path / "run")
    finetune(config, QUIET)
    values = explained(config.out)
    sizes = set()
    for file in [values["pictures"][0]["image"], part(config.out, "mistakes")["unsure"][0]["image"]]:
        with Image.open(config.out / "report" / file) as image:
            sizes.add(image.size)
    assert sizes == {(224, 224), (96, 96)}


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_what_cannot_be_found_out_is_said_in_a_line_each(trained, tmp_path):
    run = trained("full")
    moved = tmp_path / "moved"
    edit(run, {"data": str(moved)})
    problems = explain(run)
    assert [line.partition(": ")[0] for line in problems] == ["mistakes", "pictures", "data"]
    assert all(line.endswith(f"the run's pictures are not in {moved} any more") for line in problems)
    assert {path.name for path in (run / "report").iterdir()} == {"flops.json"}


def test_pictures_that_are_elsewhere_now_are_found_there(trained, tmp_path, pictures):
    """The run says `--data pictures`, from a folder that is not the current one."""
    run = trained("full")
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"data": "pictures"}))
    assert explain(run) == []


def test_other_pictures_than_the_run_had_are_noticed(trained, tmp_path):
    run = trained("full")
    shutil.copytree(Path(RunFolder(run).read()[1].data), tmp_path / "data")
    next((tmp_path / "data" / "val" / "red").iterdir()).unlink()
    edit(run, {"data": str(tmp_path / "data")})
    assert all("the pictures are not those that the run was made with" in line for line in explain(run))


def test_a_run_without_a_finished_epoch(trained):
    run = trained("full")
    (run / "model.safetensors").unlink()
    problems = explain(run)
    assert len(problems) == 2 and all("holds no model yet" in line for line in problems)
    assert (run / "report" / "data.json").is_file()


@pytest.mark.parametrize("text", ["{", '{"index": 0}', '{"index": 99, "label": 0, "top": [[0, 1.0]]}', "[]"])
def test_predictions_that_are_not_of_the_run(trained, text):
    run = trained("full")
    (run / "report").mkdir()
    (run / "report" / "predictions.jsonl").write_text(text + "\n")
    problems = explain(run)
    assert len(problems) == 2 and all("predictions.jsonl" in line and "\n" not in line for line in problems)


def test_what_is_no_run(tmp_path):
    assert explain(tmp_path) == [f"{tmp_path} is not a run folder: there is no config.yaml in it"]
    assert not (tmp_path / "report").exists()


def test_a_part_that_fails_for_whatever_reason_fails_alone(trained, monkeypatch):
    run = trained("full")
    (run / "report").mkdir()
    (run / "report" / "pictures").write_text("in the way")
    problems = explain(run)
    assert len(problems) == 1 and problems[0].startswith("pictures: could not write ")
    assert not (run / "report" / "pictures.json").exists() and (run / "report" / "mistakes.json").is_file()


def test_noise_and_threads_are_left_as_they_were(trained):
    run = trained("merge", method="alast", alast=MERGING)
    noise = torch.get_rng_state()
    explain(run)
    assert torch.equal(torch.get_rng_state(), noise)
