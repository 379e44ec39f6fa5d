#!/usr/bin/env python3
"""Writes the tables of README.md and docs/ from the JSON in results/: no figure there is typed by hand.

python benchmarks/tables.py            # rewrites the blocks between <!-- NAME --> and <!-- /NAME -->
python benchmarks/tables.py --check    # exit code 1 where a text is not what the results say
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def step_cost(result: dict[str, Any]) -> str:
    """Ratios of a step of full fine-tuning over one of ALaST."""
    lines = ["| | precision | FLOPs | saved bytes | step time |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        r = row["ratios"]
        if row["variant"] == "full":
            flops, saved = row["flops_per_sample"] / 1e9, row["saved_bytes_per_sample"] / 2**20
            figures = f"{flops:.1f} GFLOPs/picture | {saved:.1f} MiB/picture | {row['step_time_s']:.2f} s"
        else:
            figures = f"{r['flops']:.2f}x less | {r['saved_bytes']:.2f}x less | {r['step_time']:.2f}x faster"
        lines.append(f"| {row['variant']} | {row['precision']} | {figures} |")
    config, env = result["config"], result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"{config['model']}, batch {config['batch_size']}, {env['device']}, {env['threads']} threads, torch "
            f"{env['versions']['torch']}; steps taken in turn, medians of {config['rounds']}.",
        ]
    )


def presets(result: dict[str, Any]) -> str:
    """Accuracy of every preset on two tasks, and a step's time, saved bytes and peak of full fine-tuning's."""
    models = list(result["costs"])
    heads = [f"{what}, {model.split('_')[1]}" for model in models for what in ("time", "saved", "peak")]
    lines = [_line(["preset", "first task, %", "second task, %", *heads]), _line(["---"] * (3 + len(heads)))]
    for row in result["rows"]:
        costs = []
        for model in models:
            own, full = result["costs"][model][row["preset"]], result["costs"][model]["full"]
            shares = [own[name] / full[name] for name in ("saved_bytes", "peak_memory_bytes")]
            costs += [f"{share:.2f}" for share in (own["relative_step_time"], *shares)]
        lines.append(_line([row["preset"], *(_of_seeds(row[task]) for task in ("cifar", "fashion")), *costs]))
    config, env = result["config"], result["environment"]
    batches = ", ".join(f"{model} (batch {size})" for model, size in config["batch_sizes"].items())
    note = (
        f"{config['epochs']} epochs each of the micro ViT, batch {config['batch_size']}, lr {config['lr']:g}, on "
        f"five CIFAR-10 classes and on Fashion-MNIST, last epoch, mean ± standard deviation "
        f"over seeds (how many). A step, relative to one of full fine-tuning: {batches}; "
        f"{env['device']}, {config['threads']} thread."
    )
    return "\n".join([*lines, "", note])


def few_pictures(result: dict[str, Any]) -> str:
    """Accuracy with few training pictures: five epochs, and as many as a run takes that does not say how many."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["task"], row["pictures"], row["setting"]), []).append(row)
    lines = [
        _line(["task", "pictures", "5 epochs, %", "epochs of 250 steps", "accuracy, %", "seeds"]),
        _line(["---"] * 6),
    ]
    for task, pictures in dict.fromkeys((task, pictures) for task, pictures, _ in found):
        few, enough = (found.get((task, pictures, setting), []) for setting in ("5 epochs", "250 steps"))
        if few and enough:
            means = [f"{100 * statistics.mean(row['accuracy'] for row in rows):.1f}" for rows in (few, enough)]
            lines.append(_line([task, pictures, means[0], enough[0]["epochs"], means[1], min(len(few), len(enough))]))
    config, env = result["config"], result["environment"]
    note = (
        f"Micro ViT, batch {config['batch_size']}, default settings, {config['held_out']} held-out pictures of five "
        f"CIFAR-10 classes or of Fashion-MNIST, last epoch, mean over seeds. {env['device']}."
    )
    return "\n".join([*lines, "", note])


def _of_seeds(found: dict[str, Any]) -> str:
    spread = "" if found["spread"] is None else f" ± {100 * found['spread']:.1f}"
    return f"{100 * found['accuracy']:.1f}{spread} ({len(found['seeds'])})"


def lora_cost(result: dict[str, Any]) -> str:
    """Ratios of a step of LoRA alone over one of ALaST + LoRA."""
    lines = ["| | precision | of | FLOPs | saved bytes | step time | CPU time |", "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        for other, ratios in (("full", row["ratios"]), ("LoRA alone", row.get("ratios_of_lora"))):
            if "LoRA" in row["variant"] and ratios is not None:
                cells = [f"{ratios[name]:.2f}x less" for name in ("flops", "saved_bytes", "step_time", "cpu_time")]
                lines.append(_line([row["variant"], row["precision"], other, *cells]))
    return "\n".join(lines)


def families(result: dict[str, Any]) -> str:
    """Steps of transformers' models over those of timm's."""
    lines = ["| | precision | timm, s | transformers, s | step time | CPU time |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        times = [f"{row[name]:.2f}" for name in ("timm_s", "transformers_s", "step_time_ratio", "cpu_time_ratio")]
        lines.append(_line([row["method"], row["precision"], *times]))
    config, env = result["config"], result["environment"]
    note = (
        f"DeiT-S, batch {config['batch_size']}, {env['device']}, {env['threads']} threads; steps taken in turn, "
        f"medians of ratios of {config['rounds']} rounds."
    )
    return "\n".join([*lines, "", note])


def memory(result: dict[str, Any]) -> str:
    """Where the memory goes, counted, beside the measured peak."""
    heads = ["", "batch", "weights", "gradients", "optimizer", "saved", "working", "sum", "peak"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    fields = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "saved_bytes", "working_bytes", "total_bytes")
    for row in result["rows"]:
        name = row["method"] + (", release" if row["optimizer_state"] == "release" else "")
        name += ", checkpointing" if row["grad_checkpointing"] else ""
        sizes = [f"{row[field] / 2**20:.0f}" for field in (*fields, "peak_memory_bytes")]
        lines.append(_line([name, row["batch_size"], *sizes]))
    config, env = result["config"], result["environment"]
    note = (
        f"MiB, {config['model']}, {config['precision']}, {env['device']}, {env['threads']} threads; the peak is that "
        "of the process beyond what it had before the model. *working* is what a step needs beyond gradients and saved "
        "bytes."
    )
    return "\n".join([*lines, "", note])


def heap(result: dict[str, Any]) -> str:
    """The peak of a process with and without limits, and the time that they cost."""
    lines = [
        "| | precision | PyTorch alone, MiB | snello, MiB | time | tokens in multiples of 8, MiB | time | freed memory "
        "given back, MiB | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["method"], row["precision"], row["limit"]): row for row in result["rows"]}
    for method, precision in dict.fromkeys(key[:2] for key in rows):
        cells = [method, precision, f"{rows[method, precision, 'none']['peak_bytes'] / 2**20:.0f}"]
        for limit in ("kernels", "multiple", "heap"):
            row = rows[method, precision, limit]
            cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['step_time_of_none']:.2f}"]
        lines.append(_line(cells))
    config, env = result["config"], result["environment"]
    note = (
        f"{config['model']}, batch {config['batch_size']}, {config['steps']} steps, budgets moving by 0.01 a step; "
        f"peak of the process beyond what it had before the model; step time against PyTorch alone, taken in turn. "
        f"{env['device']}, {config['threads']} threads."
    )
    return "\n".join([*lines, "", note])


def alast_quality(result: dict[str, Any]) -> str:
    """Accuracy beside the ratio of step times."""
    lines = ["| | epochs | seeds | accuracy, % | step time | FLOPs |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        speed = f"{row['step_time_ratio']:.2f}x faster | {row['flops_ratio']:.2f}x less"
        seeds = len(row["seeds"])
        lines.append(
            f"| {row['setting']} | {row['epochs']} | {seeds} | {100 * row['accuracy']:.1f}{spread} | {speed} |"
        )
    config, env = result["config"], result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"Micro ViT, {5 * config['per_class']} pictures to train, 5 000 to test, batch {config['batch_size']}, lr "
            f"{config['lr']}, mean ± standard deviation over seeds, {env['device']}.",
        ]
    )


def target(result: dict[str, Any]) -> str:
    """Every method: accuracy beside time, FLOPs and memory."""
    heads = ["", "epochs", "lr", "seeds", "accuracy, %", "time", "GFLOPs", "saved, MiB", "optimizer, MiB", "peak, MiB"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in result["rows"]:
        saved, flops = row["saved_bytes_per_sample"] / 2**20, row["flops_per_sample"] / 1e9
        cells = [row["setting"], row["epochs"], f"{row['lr']:g}", len(row["seeds"]), _accuracy(row)]
        cells += [f"{row['relative_time']:.2f}", f"{flops:.2f}", f"{saved:.1f}"]
        lines.append(_line(cells + [f"{row[key] / 2**20:.1f}" for key in ("optimizer_bytes", "peak_memory_bytes")]))
    config, env = result["config"], result["environment"]
    note = (
        f"Micro ViT, {5 * config['per_class']} pictures of five unseen CIFAR-10 classes, 5 000 to test, batch "
        f"{config['batch_size']}, last epoch, mean ± standard deviation over seeds. Time is that of the whole run, "
        f"relative to *full*: step time, taken in turn, times steps. FLOPs and saved bytes are those of a picture in a "
        f"step, peak memory is of a process of its own. {env['device']}, {config['threads']} thread."
    )
    return "\n".join([*lines, "", note])


def target_readme(result: dict[str, Any]) -> str:
    """The five rows that a first look needs; memory and time as shares of full fine-tuning's."""
    wanted = {
        "full": "full fine-tuning",
        "ALaST (the default), equal time": "ALaST, equal time",
        "ALaST (the default)": "ALaST, half the time",
        "LoRA": "LoRA",
        "head": "head only",
    }
    rows = {row["setting"]: row for row in result["rows"]}
    lines, full = (
        ["| | epochs | accuracy, % | time | saved for backward | peak memory |", "|---|---|---|---|---|---|"],
        rows["full"],
    )
    for setting, title in wanted.items():
        row = rows[setting]
        shares = [row[key] / full[key] for key in ("saved_bytes_per_sample", "peak_memory_bytes")]
        cells = [title, row["epochs"], f"{100 * row['accuracy']:.1f}", f"{row['relative_time']:.2f}"]
        lines.append(_line([*cells, *(f"{share:.2f}" for share in shares)]))
    config, env = result["config"], result["environment"]
    note = (
        f"Micro ViT, {5 * config['per_class']} pictures of five CIFAR-10 classes it never saw, three seeds, "
        f"{env['device']}."
    )
    return "\n".join([*lines, "", note])


def first_run(result: dict[str, Any]) -> str:
    """What `snello finetune` printed on what ships, cut to the lines that say how well and how dear."""
    lines = [line.rstrip() for line in result["output"].splitlines()]
    first, rest = lines[0], lines[1:]
    shown = ("one training step", "on ", " " * 8, "step time", "saved MiB", "peak", "accuracy ", "that is")
    kept = [line for line in rest if line.startswith(shown) and ", balanced " not in line]
    return "\n".join(["```", first, "...", *kept, "```"])


def target_short(result: dict[str, Any]) -> str:
    """Accuracy, time and memory on another task, settings unchanged."""
    heads = ["", "epochs", "seeds", "accuracy, %", "time", "saved bytes", "peak"]
    lines, full = [_line(heads), _line(["---"] * len(heads))], result["rows"][0]
    for row in result["rows"]:
        shares = [row[key] / full[key] for key in ("saved_bytes_per_sample", "peak_memory_bytes")]
        cells = [row["setting"], row["epochs"], len(row["seeds"]), _accuracy(row), f"{row['relative_time']:.2f}"]
        lines.append(_line(cells + [f"{share:.2f}" for share in shares]))
    config, env = result["config"], result["environment"]
    note = (
        f"Task {config['task']}: {config['num_classes'] * config['per_class']} pictures, {config['num_classes']} "
        f"classes, batch {config['batch_size']}; relative to *full*. {env['device']}, {config['threads']} thread."
    )
    return "\n".join([*lines, "", note])


def released_code(result: dict[str, Any]) -> str:
    """A step of the authors' released code beside one of ours at the same setting."""
    lines = ["| | precision | CPU seconds of a step | faster than full |", "|---|---|---|---|"]
    for row in result["rows"]:
        cells = [row["variant"], row["precision"], f"{statistics.median(row['cpu_times_s']):.2f}"]
        lines.append(_line([*cells, f"{row['ratios']['cpu_time']:.2f}x"]))
    config, env = result["config"], result["environment"]
    how = f"{config['threads']} thread, steps taken in turn"
    note = f"{config['model']}, batch {config['batch_size']}, {how}, {env['device']}."
    return "\n".join([*lines, "", note])


def time_tried(result: dict[str, Any]) -> str:
    """What was tried to save time, whether or not it helped."""
    heads = ["", "epochs", "seeds", "accuracy, %", "step", "run", "remark"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in sorted((row for row in result["rows"] if row["seeds"]), key=lambda row: -row["accuracy"]):
        times = [f"{row[key]:.2f}" for key in ("step_time_of_full", "relative_time")]
        lines.append(_line([row["name"], row["epochs"], len(row["seeds"]), _accuracy(row), *times, row["remark"]]))
    return "\n".join(
        [*lines, "", "Step and run: time relative to plain full fine-tuning, a step of it and five epochs."]
    )


def alast_tried(result: dict[str, Any]) -> str:
    """Settings that were tried once, best accuracy first."""
    epochs = result["config"]["full_epochs"]
    lines = ["| | epochs | lr | accuracy, % | FLOPs of the run |", "|---|---|---|---|---|"]
    for row in sorted(result["rows"], key=lambda row: -row["accuracy"]):
        name = row["setting"] + (f" (seed {row['seed']})" if row["seed"] else "") + (" *" if row["prototype"] else "")
        share = f"{row['flops'] * row['epochs'] / epochs:.2f}"
        lines.append(_line([name, row["epochs"], f"{row['lr']:g}", f"{100 * row['accuracy']:.1f}", share]))
    return "\n".join([*lines, "", f"FLOPs are relative to {epochs} epochs of full fine-tuning. *: a prototype."])


def codecs(result: dict[str, Any]) -> str:
    """Every codec: bytes, accuracy, seconds of each side and under a link."""
    links = list(result["rows"][0]["link_seconds"])
    heads = ["codec", "epochs", "seeds", "accuracy, %", "nominal", "real", "MB up", "MB down", "client s", "server s"]
    heads += [f"s under {link.split('/')[0].replace('mbit', ' Mbit/s')}" for link in links]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in result["rows"]:
        compute = row["client_seconds"] + row["server_seconds"]
        nominal = "" if row["nominal_ratio"] is None else f"{1 / row['nominal_ratio']:.0f}x"
        cells = [row["setting"], f"{row['epochs']:.0f}", len(row["seeds"]), _accuracy(row), nominal]
        cells += [f"{1 / row['ratio']:.1f}x", f"{row['uplink_bytes'] / 1e6:.1f}", f"{row['downlink_bytes'] / 1e6:.1f}"]
        cells += [f"{row['client_seconds']:.0f}", f"{row['server_seconds']:.0f}"]
        lines.append(_line(cells + [f"{compute + row['link_seconds'][link]:.0f}" for link in links]))
    return "\n".join([*lines, "", _codecs_note(result)])


def fewer_bytes(result: dict[str, Any]) -> str:
    """Every setting on both tasks: accuracy, points below uncompressed, bytes, and seconds of a slow link."""
    heads = ["", "codec", "epochs, sent", "seeds", "accuracy, %", "points below", "fewer bytes", "MB up", "MB down"]
    heads += ["of the JPEGs", "s under 10 Mbit/s", "on"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in result["rows"]:
        sent = row["epochs"] if row["send_epochs"] is None else row["send_epochs"]
        jpeg = result["jpeg_bytes"][row["task"]]
        cells = [f"{TASKS[row['task']]}: {row['name']}", f"`{row['codec']}`", f"{row['epochs']}, {sent}"]
        cells += [str(len(row["seeds"])), _accuracy(row), f"{100 * row['below']:.1f}", _times(row["times_fewer"])]
        cells += [f"{row[way] / 1e6:.2f}" for way in ("uplink_bytes", "downlink_bytes")]
        cells += [f"{row['training_bytes'] / jpeg:.2f}", f"{_link_seconds(row['training_bytes'], sent):.0f}"]
        lines.append(_line([*cells, "H100" if "H100" in row["device"] else "CPU"]))
    for task, size in result["jpeg_bytes"].items():
        cells = [f"{TASKS[task]}: the pictures as JPEG files", *[""] * 6, f"{size / 1e6:.2f}", "", "1.00"]
        lines.append(_line([*cells, f"{_link_seconds(size, 0):.0f}", ""]))
    return "\n".join([*lines, "", _bytes_note(result)])


SMALLEST = "frozen, smallest, 3 epochs sent, replayed between"
TASKS = {"cifar": "CIFAR-10", "fashion": "Fashion-MNIST"}


def _link_seconds(size: float, epochs: int) -> float:
    """What 10 Mbit/s and 20 ms a step take, in epochs of 40 steps."""
    return size * 8 / 10e6 + 0.02 * max(1, 40 * epochs)


def fewer_bytes_short(result: dict[str, Any]) -> str:
    """The rows that a first look needs, and the pictures themselves."""
    wanted = {
        "uncompressed": "`none`",
        "auto": "`auto`, the default",
        "small": "`small`",
        "frozen, auto, 2 epochs sent": "`auto`, the client frozen, 2 of 12 epochs sent",
        SMALLEST: "`smallest`, the client frozen, 3 of 20 epochs sent, `--split.replay 5`",
        "ADC as published": "`adc(0.1)`, ADC as published",
    }
    rows = {(row["task"], row["name"]): row for row in result["rows"]}
    lines = [
        "| | MB | fewer bytes | accuracy, % | fewer bytes, second task | accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in wanted.items():
        first, second = rows["cifar", name], rows["fashion", name]
        cells = [title, f"{first['training_bytes'] / 1e6:.1f}", _times(first["times_fewer"]), _accuracy(first)]
        lines.append(_line([*cells, _times(second["times_fewer"]), _accuracy(second)]))
    lines.append(_line(["the pictures as JPEG files", f"{result['jpeg_bytes']['cifar'] / 1e6:.1f}", "", "", "", ""]))
    return "\n".join([*lines, "", _bytes_note(result)])


def _bytes_note(result: dict[str, Any]) -> str:
    config = result["config"]
    jpegs = " and ".join(f"{size / 1e6:.1f} MB" for size in result["jpeg_bytes"].values())
    devices = sorted({row["device"] for row in result["rows"]})
    return (
        f"Micro ViT cut after block {config['cut']}, 5 000 pictures of five unseen CIFAR-10 classes (second task: "
        f"Fashion-MNIST, ten classes, the same settings), batch {config['batch_size']}, lr {config['lr']}, last epoch, "
        "mean ± standard deviation over three seeds unless said; all training bytes of both ways, against uncompressed "
        f"training for {config['epochs']} epochs. The pictures as JPEG files of quality 90 are {jpegs}. "
        f"{', '.join(devices)}."
    )


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def link_run(result: dict[str, Any]) -> str:
    """Seconds of whole runs under a link, by codec, and of the upload."""
    heads = ["", "codec", "steps sent", "MB up", "MB down", "s of the link"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in result["rows"]:
        megabytes = [f"{row[way] / 1e6:.1f}" for way in ("uplink_bytes", "downlink_bytes")]
        name = row["name"] if row["name"] != row["codec"] else ""
        lines.append(_line([name, f"`{row['codec']}`", row["steps"], *megabytes, f"{row['link_seconds']:.0f}"]))
    upload, config = result["upload"], result["config"]
    cells = ["uploading the pictures as JPEG files", "", "", f"{upload['bytes'] / 1e6:.1f}", "0.0"]
    lines.append(_line([*cells, f"{upload['link_seconds']:.0f}"]))
    note = (
        f"{config['model']} from random weights, {upload['pictures']} pictures of Fashion-MNIST at 224 pixels, "
        f"{config['epochs']} epochs, batch {config['batch_size']}, cut after block {config['cut']}; the time that "
        f"{config['link']} takes for the bytes that crossed, beside what the halves compute."
    )
    return "\n".join([*lines, "", note])


def codec_cost(result: dict[str, Any]) -> str:
    """Seconds of a codec against those of a step."""
    lines = ["| codec | ms | share of a step | the client's ms | of its step |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        times = [f"{1000 * row['seconds']:.0f}", f"{row['share']:.2%}"]
        times += [f"{1000 * row['client_seconds']:.0f}", f"{row['client_share']:.2%}"]
        lines.append(_line([row["codec"], *times]))
    config, env, kmeans = result["config"], result["environment"], result["kmeans"]
    batch = config["batch_size"]
    note = (
        f"DeiT-S, batch {batch}, cut after block {config['cut']}, {config['precision']}, {env['device']}, "
        f"{env['threads']} threads; a step (forward and backward) takes {result['step_seconds']:.1f} s, the client's "
        f"half {result['client_step_seconds']:.1f} s of it. "
        f"K-means alone on {batch} rows of 197: {1000 * kmeans['seconds']:.1f} ms, {kmeans['share']:.2%} of the "
        "client half's forward and backward pass of DeiT-T."
    )
    return "\n".join([*lines, "", note])


def network(result: dict[str, Any]) -> str:
    """What the network costs, each figure beside what it is measured against."""
    step, echo, clients, link = (result[name] for name in ("step", "echo", "clients", "link"))
    none, auto = link["codecs"]["none"], link["codecs"]["adc(samples=1, tokens=0.4)+int4"]
    session = clients["bytes_per_session"] / 2**20
    allowed = (clients["weights_and_moments_bytes"] + clients["two_messages_bytes"]) / 2**20
    one, eight = clients["steps_per_second"]["1"], clients["steps_per_second"]["8"]
    lines = [
        "| | measured | against | ratio |",
        "|---|---|---|---|",
        f"| a step over loopback, TLS, `adc(0.1)` | {step['network_seconds']:.2f} s | "
        f"{step['one_process_seconds']:.2f} s in one process | {step['ratio']:.2f} |",
        f"| round trip of a frame of 2 MiB, TLS | {echo['snello_ms']:.1f} ms | {echo['bare_ms']:.1f} ms of a bare "
        f"grpc.aio echo | {echo['ratio']:.2f} |",
        f"| steps per second of 8 clients (micro ViT) | {eight:.2f} | {one:.2f} of one | {clients['ratio']:.2f} |",
        f"| server memory per session more | {session:.1f} MiB | {allowed:.1f} MiB: weights, moments, two messages | "
        f"{session / allowed:.2f} |",
        f"| a step at 10 Mbit/s and 20 ms, `none` | {none['seconds']:.1f} s | {none['predicted_seconds']:.1f} s from "
        f"compute and bytes | {none['seconds'] / none['predicted_seconds']:.2f} |",
        f"| the same, `adc(samples=1, tokens=0.4)+int4` | {auto['seconds']:.1f} s | "
        f"{auto['predicted_seconds']:.1f} s | {auto['seconds'] / auto['predicted_seconds']:.2f} |",
        f"| speed-up by that | {link['speedup']:.1f}x | {link['predicted_speedup']:.1f}x predicted | "
        f"{link['of_predicted']:.2f} |",
    ]
    env = step["environment"]
    note = (
        f"DeiT-T cut after block 3, batch {step['config']['batch_size']}, unless said; clients and server share one "
        f"machine: {env['device']}. Figures of a row were taken in turn."
    )
    return "\n".join([*lines, "", note])


def _accuracy(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _codecs_note(result: dict[str, Any]) -> str:
    config, env = result["config"], result["environment"]
    pictures = 5 * config["per_class"]
    return (
        f"Micro ViT cut after block {config['cut']}, {pictures} pictures of five unseen CIFAR-10 classes, 5 000 to "
        f"test, batch {config['batch_size']}, lr {config['lr']}, last epoch, mean ± standard deviation over seeds; "
        "bytes of both ways against uncompressed fp32 over as many epochs, all counted but evaluation. The pictures "
        f"as JPEG files of quality 90 are {result['jpeg_bytes'] / 1e6:.1f} MB. {env['device']}."
    )


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "step_cost": ("step_cost", step_cost),
    "lora_cost": ("step_cost", lora_cost),
    "families": ("families", families),
    "memory": ("memory", memory),
    "heap": ("heap", heap),
    "alast_quality": ("alast_quality", alast_quality),
    "alast_tried": ("alast_tried", alast_tried),
    "target": ("target", target),
    "first_run": ("first_run", first_run),
    "target_readme": ("target", target_readme),
    "target_fashion": ("target_fashion", target_short),
    "target_all": ("target_all", target_short),
    "presets": ("presets", presets),
    "few_pictures": ("few_pictures", few_pictures),
    "released_code": ("released_code", released_code),
    "time_tried": ("time_tried", time_tried),
    "codecs": ("codecs", codecs),
    "fewer_bytes": ("fewer_bytes", fewer_bytes),
    "fewer_bytes_short": ("fewer_bytes", fewer_bytes_short),
    "link_run": ("link_run", link_run),
    "codec_cost": ("codec_cost", codec_cost),
    "network": ("network", network),
}
TEXTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("alast", "choose", "measured", "memory", "split")),
)
"""Every text with a table."""


def render(text: str) -> str:
    """`text` with every table block made anew from its results file."""
    for name, (results, table) in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        block = table(json.loads((ROOT / "results" / f"{results}.json").read_text()))
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.S
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    changed = False
    for file in TEXTS:
        text = file.read_text()
        made = render(text)
        changed |= made != text
        if not args.check:
            file.write_text(made)
    return int(args.check and changed)


if __name__ == "__main__":
    sys.exit(main())
