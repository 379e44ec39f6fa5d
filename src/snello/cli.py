"""The command line: `snello <verb>`, every flag, default and help text from the dataclasses in `snello.config`.

What needs PyTorch is imported inside the verbs, so that help answers at once. Errors a user can mend are one line on
stderr and exit code 2.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from snello.config import (
    CertsConfig,
    CheckDataConfig,
    CodecsConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    JoinConfig,
    PlanConfig,
    PredictConfig,
    Recipe,
    ServeConfig,
)
from snello.config.values import flag, from_dict, read_yaml
from snello.errors import ConfigError, SnelloError, printable

T = TypeVar("T")
R = TypeVar("R", bound=Recipe)

USAGE = 2
INTERRUPTED = 130


def finetune(args: Sequence[str]) -> int:
    """Fine-tune a Vision Transformer on labelled pictures."""
    config = _parse(FinetuneConfig, args, "finetune", _default(args))
    if _processes() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or DDP warns of what ALaST needs
    from snello.finetuning import finetune as run
    from snello.train.signals import Interrupted

    try:
        run(config)
    except Interrupted as interrupted:
        return _interrupted(str(interrupted))
    return 0


def evaluate(args: Sequence[str]) -> int:
    """Measure the accuracy of a run's model."""
    config = _parse(EvaluateConfig, args, "evaluate")
    from snello.inference import evaluate as run

    result = run(config)
    if config.format == "json":
        print(json.dumps(result))
    else:
        for note in result["notes"]:
            print(note, file=sys.stderr)
        skipped = f", {result['skipped']} bad ones left out" if result["skipped"] else ""
        print(
            f"accuracy {result['accuracy']:.2%}, balanced accuracy {result['balanced_accuracy']:.2%}, "
            f"loss {result['loss']:.4f} on {result['pictures']} pictures{skipped}"
        )
        if config.per_class:
            from snello.report.terminal import print_per_class

            print_per_class(result["per_class"])
    return 0


def check_data(args: Sequence[str]) -> int:
    """Read every picture once, and list what is broken."""
    config = _parse(CheckDataConfig, args, "check-data")
    from snello.data.examining import check_data as run
    from snello.data.examining import print_findings

    findings = run(config)
    if config.format == "json":
        print(json.dumps(findings.to_dict(), indent=2))
    else:
        print_findings(findings)
    return 1 if findings.broken else 0


def predict(args: Sequence[str]) -> int:
    """Say what is on pictures, with the model of a run."""
    config = _parse(PredictConfig, args, "predict")
    from snello.inference import predict as run

    rows = run(config)
    if config.format == "json":
        print(json.dumps(list(rows), indent=2))
        return 0
    for row in rows:
        if "notes" in row:
            print("\n".join(row["notes"]), file=sys.stderr)
        elif "skipped" in row:
            print(f"{row['skipped']} bad pictures left out", file=sys.stderr)
        else:
            classes = ", ".join(f"{c['class']} {c['probability']:.1%}" for c in row["classes"])
            print(printable(f"{row['path']}: {classes}"))
    return 0


def plan(args: Sequence[str]) -> int:
    """Say what fits into a memory, the fastest first, with the command."""
    config = _parse(PlanConfig, args, "plan")
    from snello.measure.plan import make_plan

    found = make_plan(config, lambda text: print(text, file=sys.stderr))
    if config.format == "json":
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from snello.report.terminal import print_plan

        print_plan(found)
    return 0


def codecs(args: Sequence[str]) -> int:
    """List what may stand at a cut, with options, sources and exact bytes."""
    config = _parse(CodecsConfig, args, "codecs")
    from snello.split.catalog import list_codecs

    rows = list_codecs(config)
    if config.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        from snello.report.terminal import print_codecs

        print_codecs(config, rows)
    return 0


def serve(args: Sequence[str]) -> int:
    """Be the server of split learning: clients keep their pictures."""
    config = _parse(ServeConfig, args, "serve", _default(args, ServeConfig))
    from snello.split.server.command import serve as run

    run(config)
    return 0


def join(args: Sequence[str]) -> int:
    """Train with a server, on pictures that stay here."""
    config = _parse(JoinConfig, args, "join", _join_default(args))
    from snello.split.client.join import join as run
    from snello.train.signals import Interrupted

    try:
        run(config)
    except Interrupted as interrupted:
        return _interrupted(str(interrupted))
    return 0


def certs(args: Sequence[str]) -> int:
    """Make certificates and tokens for a server and its clients."""
    config = _parse(CertsConfig, args, "certs")
    from snello.split.security.certs import make_certs

    print("\n".join(make_certs(config)))
    return 0


def doctor(args: Sequence[str]) -> int:
    """Say what is wrong between here and a server."""
    config = _parse(DoctorConfig, args, "doctor")
    from rich.console import Console

    from snello.split.client.endpoints import make_endpoint, probe
    from snello.split.security.doctor import examine, print_findings, to_rows

    findings = examine(config, lambda: probe(make_endpoint(config.address, config.certs, config.name)))
    if config.format == "json":
        print(json.dumps(to_rows(findings), indent=2))
    else:
        print_findings(findings, Console())
    return 0 if all(finding.ok for finding in findings) else 1


def export(args: Sequence[str]) -> int:
    """Write a run's model for other software: timm, transformers, ONNX."""
    config = _parse(ExportConfig, args, "export")
    from snello.export import export as run
    from snello.split.client.model import fetch_server_half

    done = run(config, fetch_server_half)
    print(f"{done.path}\n{done.card}\n{done.line}")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "check-data": check_data,
    "export": export,
    "plan": plan,
    "codecs": codecs,
    "certs": certs,
    "serve": serve,
    "join": join,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code.

    0, 1 where a check found something, 2 for input that cannot be used, 130 where the user interrupted.
    """
    verb, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(f"snello {version('snello')}")
        return 0
    try:
        if verb not in VERBS:
            raise ConfigError(f"unknown verb {verb!r}; known: {', '.join(VERBS)}")
        return VERBS[verb](rest)
    except SnelloError as error:
        _say(f"error: {error.for_command_line}")
        return USAGE
    except KeyboardInterrupt:
        return _interrupted("interrupted")
    except BrokenPipeError:  # who reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else flushing at exit would fail again
        return 0


def _interrupted(text: str) -> int:
    _say(text)
    return INTERRUPTED


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _say(text: str) -> None:
    """One line, also where torchrun started several processes, which all come here: the first knows what to say."""
    if _processes() == 1 or os.environ.get("RANK", "0") == "0":
        print(f"snello: {text}", file=sys.stderr)
    else:
        from snello.train.ranks import wait_for_main

        wait_for_main()


def _help() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.__doc__}" for name, verb in VERBS.items())
    return (
        "snello fine-tunes Vision Transformers where compute, memory or bandwidth is scarce.\n\n"
        f"usage: snello VERB [options]\n\n{verbs}\n\n"
        "snello VERB --help lists a verb's options. Without any, `snello finetune` runs on what ships with snello."
    )


def _parse(cls: type[T], args: Sequence[str], verb: str, default: T | None = None) -> T:
    """The config that `args` describe; what tyro draws as a box of several lines becomes one line."""
    box = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            config: T = tyro.cli(cls, args=list(args), prog=f"snello {verb}", **options)
            return config
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise ConfigError(_one_line(box.getvalue(), verb)) from None


def _one_line(box: str, verb: str) -> str:
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()]
    told = [line for line in lines[1:] if line]  # the first is the box's title
    until = next((i for i, line in enumerate(told) if line.startswith(("Argument helptext", "For full help"))), None)
    text = re.sub(r"\s+", " ", " ".join(told[:until])) or "cannot be parsed"
    text = re.sub(r"^Error parsing \w+: (?=--|[A-Z]+ )", "", text)  # our own words, which name the flag already
    text = re.sub(r"^Error parsing (alast): (\w+) must", lambda m: f"{flag('.'.join(m.groups()))} must", text)
    return f"{text} (snello {verb} --help lists the options)"


@dataclass(frozen=True)
class _Sources:
    """The flags that say where other settings come from; read before the others."""

    config: Path | None = None
    out: Path | None = None
    resume: bool = False


def _default(args: Sequence[str], cls: type[R] = FinetuneConfig) -> R | None:  # type: ignore[assignment]
    """What flags are laid over: the run's own config with --resume, else the file given with --config, if any."""
    if any(arg in ("-h", "--help") for arg in args):
        return None
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        sources, _ = tyro.cli(_Sources, args=list(args), return_unknown_args=True)
        file = sources.config
        if file is None and sources.resume and sources.out is not None and (sources.out / "config.yaml").is_file():
            file = sources.out / "config.yaml"
        if file is not None:
            values = read_yaml(file)
            if values.pop("resolved", None) is not None:  # a run's own config.yaml: its folder is not the new run's
                values["out"] = None
            return from_dict(cls, values, str(file))
    return None


def _join_default(args: Sequence[str]) -> JoinConfig | None:
    """With --resume, what the run was started with."""
    if any(arg in ("-h", "--help") for arg in args):
        return None
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        sources, _ = tyro.cli(_Sources, args=list(args), return_unknown_args=True)
        file = None if sources.out is None else sources.out / "config.yaml"
        if sources.resume and file is not None and file.is_file():
            values = read_yaml(file)
            if isinstance(values.get("resolved"), dict) and "server" in values["resolved"]:
                known = {name: values[name] for name in JoinConfig.__dataclass_fields__ if name in values}
                server = {k: v for k, v in values["resolved"]["server"].items() if k != "session"}
                return from_dict(JoinConfig, {**known, **server}, str(file))
    return None


if __name__ == "__main__":
    sys.exit(main())
