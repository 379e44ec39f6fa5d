"""The command line: `snello <verb>`, every flag, default and help text from the dataclasses in `snello.config`.

Help, completion and what is said of a wrong flag are in `snello.commandline`. What needs PyTorch is imported inside the
verbs, so that help answers at once. Errors a user can mend are one line on stderr and exit code 2. What snello changes
in a process, environment and allocator, is changed here.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import tyro

from snello import __version__
from snello import config as configs
from snello.commandline.arguments import require_verb, with_own_names
from snello.commandline.completion import completion
from snello.commandline.help import asked, help_text
from snello.config import JoinConfig, Recipe
from snello.config.effect import effective
from snello.config.values import flag, from_dict, read_yaml
from snello.environment import num_processes, set_environment
from snello.errors import ConfigError, SnelloError, printable
from snello.train.signals import Interrupted

T = TypeVar("T")
Verb = Callable[[Any], int | None]
"""Does what its config says and returns the exit code, 0 where it says none."""


def finetune(config: configs.FinetuneConfig) -> None:
    """Fine-tune a Vision Transformer on labelled pictures."""
    from snello.finetuning import finetune as run

    _prepare(config)
    run(config)


def evaluate(config: configs.EvaluateConfig) -> None:
    """Measure the accuracy of a run's model."""
    from snello.inference import evaluate as run
    from snello.reports.terminal import print_per_class

    result = run(config)
    if config.format == "json":
        print(json.dumps(result))
        return
    for note in result["notes"]:
        print(note, file=sys.stderr)
    skipped = f", {result['skipped']} bad ones left out" if result["skipped"] else ""
    print(
        f"accuracy {result['accuracy']:.2%}, balanced accuracy {result['balanced_accuracy']:.2%}, "
        f"loss {result['loss']:.4f} on {result['pictures']} pictures{skipped}"
    )
    if config.per_class:
        print_per_class(result["per_class"])


def predict(config: configs.PredictConfig) -> None:
    """Say what is on pictures, with the model of a run."""
    from snello.inference import predict as run

    rows = run(config)
    if config.format == "json":
        print(json.dumps(list(rows), indent=2))
        return
    for row in rows:
        if "notes" in row:
            print("\n".join(row["notes"]), file=sys.stderr)
        elif "skipped" in row:
            print(f"{row['skipped']} bad pictures left out", file=sys.stderr)
        else:
            classes = ", ".join(f"{c['class']} {c['probability']:.1%}" for c in row["classes"])
            print(printable(f"{row['path']}: {classes}"))


def check_data(config: configs.CheckDataConfig) -> int:
    """Read every picture once, and list what is broken."""
    from snello.data.examining import check_data as run
    from snello.data.examining import print_findings

    findings = run(config)
    _print(config.format, findings.to_dict(), lambda: print_findings(findings))
    return 1 if findings.broken else 0


def report(config: configs.ReportConfig) -> None:
    """Draw the report of a run, or of several side by side."""
    from snello.explain.report import run_report

    print(run_report(config).path)


def export(config: configs.ExportConfig) -> None:
    """Write a run's model for other software: timm, transformers, ONNX."""
    from snello.export import export as run
    from snello.split.client.model import fetch_server_half

    done = run(config, fetch_server_half)
    print(f"{done.path}\n{done.card}\n{done.line}")


def plan(config: configs.PlanConfig) -> None:
    """Say what fits into a memory, the fastest first, with the command."""
    from snello.measure.plan import make_plan
    from snello.reports.terminal import print_plan

    found = make_plan(config, lambda text: print(text, file=sys.stderr))
    _print(config.format, found.to_dict(), lambda: print_plan(found))


def codecs(config: configs.CodecsConfig) -> None:
    """List what may stand at a cut: its options, sources and exact bytes."""
    from snello.reports.terminal import print_codecs
    from snello.split.catalog import list_codecs

    rows = list_codecs(config)
    _print(config.format, rows, lambda: print_codecs(config, rows))


def certs(config: configs.CertsConfig) -> None:
    """Make certificates and tokens for a server and its clients."""
    from snello.split.security.certs import make_certs

    print("\n".join(make_certs(config)))


def serve(config: configs.ServeConfig) -> None:
    """Be the server of split learning: clients keep their pictures."""
    from snello.split.server.command import serve as run

    _prepare(config)
    run(config)


def join(config: JoinConfig) -> None:
    """Train with a server, on pictures that stay here."""
    from snello.explain.report import report_after
    from snello.split.client.join import join as run

    run(config, on_settings=_prepare, on_end=report_after if config.report else None)


def doctor(config: configs.DoctorConfig) -> int:
    """Say what is wrong between here and a server."""
    from rich.console import Console

    from snello.split.client.endpoints import make_endpoint, probe
    from snello.split.security.doctor import examine, print_findings, to_rows

    findings = examine(config, lambda: probe(make_endpoint(config.address, config.certs, config.name)))
    _print(config.format, to_rows(findings), lambda: print_findings(findings, Console()))
    return 0 if all(finding.ok for finding in findings) else 1


_VERBS: tuple[Verb, ...] = (
    finetune,
    evaluate,
    predict,
    report,
    check_data,
    export,
    plan,
    codecs,
    certs,
    serve,
    join,
    doctor,
)
VERBS = {verb.__name__.replace("_", "-"): verb for verb in _VERBS}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code.

    0, 1 where a check found something, 2 for input that cannot be used, 130 where the user interrupted.
    """
    verb, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        text = _told(verb, rest)
        if text is not None:
            print(text)
            return 0
        set_environment()
        run = VERBS[verb]
        return run(_parse(_config_of(run), rest, verb)) or 0
    except SnelloError as error:
        _say(f"error: {error.for_command_line}")
        return 2
    except (Interrupted, KeyboardInterrupt) as interrupted:
        _say(str(interrupted) or "interrupted")
        return 130
    except BrokenPipeError:  # who reads the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else flushing at exit would fail again
        return 0


def _prepare(recipe: Recipe) -> None:
    """What a run wants of the process: with gradient checkpointing, memory that is freed goes back at once."""
    if recipe.grad_checkpointing:
        from snello.devices import return_large_blocks

        return_large_blocks()


def _print(form: str, values: object, as_text: Callable[[], None]) -> None:
    """Prints a result: `values` as JSON, or else as text."""
    print(json.dumps(values, indent=2)) if form == "json" else as_text()


def _say(text: str) -> None:
    """One line, also where torchrun started several processes, which all come here: the first knows what to say."""
    if num_processes() == 1 or os.environ.get("RANK", "0") == "0":
        print(f"snello: {text}", file=sys.stderr)
    else:
        from snello.train.ranks import wait_for_main

        wait_for_main()


def _told(verb: str, rest: Sequence[str]) -> str | None:
    """What is printed where nothing is to be done: help, version, a completion; None where a verb is to run.

    Raises:
        ConfigError: for an unknown verb, shell or topic of help.
    """
    if verb == "help" and rest:
        verb, *topics = rest
        rest = ["--help", *topics]
    if verb in ("-h", "--help", "--help-all", "help"):
        return _help()
    if verb == "--version":
        return f"snello {__version__}"
    if verb.partition("=")[0] == "--print-completion":
        shell = verb.partition("=")[2] or next(iter(rest), "")
        return completion(shell, {name: _config_of(run) for name, run in VERBS.items()}).rstrip("\n")
    require_verb(verb, VERBS)
    ask = asked(rest)
    return None if ask is None else help_text(_config_of(VERBS[verb]), verb, *ask)


def _config_of(verb: Verb) -> type[Any]:
    config: type[Any] = verb.__annotations__["config"]
    return config


def _help() -> str:
    verbs = "\n".join(f"  {name:<10} {verb.__doc__}" for name, verb in VERBS.items())
    return (
        "snello fine-tunes Vision Transformers where compute, memory or bandwidth is\nscarce.\n\n"
        f"usage: snello VERB [options]\n\n{verbs}\n\n"
        "snello VERB --help shows the options that matter first, --help-all all of them,\n"
        "--help NAME one. Without any, `snello finetune` runs on what ships with snello.\n"
        'Your shell completes them after: eval "$(snello --print-completion bash)"'
    )


def _parse(cls: type[T], args: Sequence[str], verb: str) -> T:
    """The config that `args` describe; what tyro draws as a box of several lines becomes one line."""
    args = with_own_names(cls, args, verb)
    default = _default(cls, args)
    options: dict[str, Any] = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            config: T = tyro.cli(cls, args=args, prog=f"snello {verb}", **options)
            return config
    except SystemExit:
        raise ConfigError(_one_line(box.getvalue(), verb)) from None


def _one_line(box: str, verb: str) -> str:
    rows = (line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:])  # the first is the box's title
    lines = [row for row in rows if row.strip("-")]  # where the terminal has no such signs, rules are dashes
    ends = (i for i, line in enumerate(lines) if line.startswith(("Argument helptext", "For full help")))
    text = " ".join(" ".join(lines[: next(ends, None)]).split()) or "cannot be parsed"
    text = re.sub(r" Got errors: .*", "", text)  # of each type that a value may have
    text = re.sub(r"^Error parsing \w+: (?=--|[A-Z]+ )", "", text)  # our own words, which name the flag already
    text = re.sub(r"^Error parsing (alast): (\w+) must", lambda m: f"{flag('.'.join(m.groups()))} must", text)
    return f"{text} (snello {verb} --help-all lists the options)"


@dataclass(frozen=True)
class _Sources:
    """The flags that say where other settings come from; read before the others."""

    config: Path | None = None
    out: Path | None = None
    resume: bool = False


def _default(cls: type[T], args: Sequence[str]) -> T | None:
    """What flags are laid over: the run's own config with --resume, else the file given with --config, if any.

    It is checked only together with the flags, which may give what its settings need.
    """
    if not issubclass(cls, Recipe | JoinConfig):
        return None
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        sources, _ = tyro.cli(_Sources, args=list(args), return_unknown_args=True)
        run = sources.out / "config.yaml" if sources.resume and sources.out is not None else None
        file = sources.config if issubclass(cls, Recipe) and sources.config is not None else run
        if file is None or (file is run and not file.is_file()):
            return None
        values = read_yaml(file, None if file is run else f"--config {file}")
        resolved = values.pop("resolved", None)
        if not issubclass(cls, Recipe):  # `snello join`: the file also has the server's settings, and not its address
            server = (resolved or {}).get("server")
            if server is None:
                return None
            values = {f.name: values[f.name] for f in fields(JoinConfig) if f.name in values}
            values |= {name: value for name, value in server.items() if name != "session"}
        if resolved is not None:  # of a run
            values = values | {"out": None} if file is run else _of_a_new_run(values, resolved, file)
            values = effective(cls, values, str(file))
        return from_dict(cls, values, str(file), checked=False)
    return None


def _of_a_new_run(values: dict[str, Any], resolved: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings of a run for another one: not into its folder, and with its pictures from any folder."""
    values = dict(values)
    out = Path(values.get("out") or "")
    if not out.parts or file.resolve().parent.parts[-len(out.parts) :] == out.parts:
        values["out"] = None
    for name in ("data", "data_root"):
        known = resolved.get(name)
        if known is not None and Path(known).exists() and not Path(values[name]).exists():
            values[name] = known
    return values


if __name__ == "__main__":
    sys.exit(main())
