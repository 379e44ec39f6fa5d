"""The user's process stays as it is; what the command line and the measuring processes set in their own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_python

from snello.config import FinetuneConfig
from snello.environment import GRPC, KERNELS, total_memory


def run(code: str, **environment: str) -> dict[str, str]:
    """The environment after `code` in a process of its own, which starts without what snello would set."""
    names = tuple(KERNELS | GRPC)
    clean = f"import os\nfor name in {names!r}: os.environ.pop(name, None)\n"
    given = f"os.environ |= {environment!r}\n"
    result = run_python("-c", clean + given + code + "\nimport json, os; print(json.dumps(dict(os.environ)))")
    assert result.returncode == 0, result.stderr
    values: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return values


@pytest.mark.slow
def test_importing_changes_nothing():
    """No environment variable, and no setting of the C library's allocator."""
    # what snello imports has habits of its own: those are not ours to test
    code = """
import contextlib, importlib, os, pkgutil
for name in ("timm", "accelerate", "matplotlib.pyplot", "grpc", "transformers", "lightning.pytorch", "peft"):
    with contextlib.suppress(ImportError): importlib.import_module(name)
import snello
from snello import SnelloError, devices
def refuse(): raise AssertionError("the allocator is set")
devices.return_large_blocks = devices.return_freed_memory = refuse
before, num = dict(os.environ), 0
for module in pkgutil.walk_packages(snello.__path__, "snello."):
    with contextlib.suppress(ImportError, SnelloError): importlib.import_module(module.name); num += 1
assert num > 80, num
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
"""
    assert not (KERNELS | GRPC).keys() & run(code).keys()


@pytest.mark.parametrize("verb", ["check-data", "doctor"])
def test_the_command_line_sets_its_own_process(verb):
    code = f"from snello import cli; assert cli.main([{verb!r}]) == 2"
    values = run(code)
    assert {name: values[name] for name in KERNELS | GRPC} == KERNELS | GRPC


def test_what_the_user_set_stays():
    code = "from snello import cli; cli.main(['check-data'])"
    values = run(code, LRU_CACHE_CAPACITY="300", GRPC_VERBOSITY="debug")
    assert (values["LRU_CACHE_CAPACITY"], values["GRPC_VERBOSITY"]) == ("300", "debug")
    assert values["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == KERNELS["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]


def test_help_sets_nothing():
    code = "from snello import cli\nassert cli.main(['--help']) == 0 == cli.main(['--version'])"
    assert not (KERNELS | GRPC).keys() & run(code).keys()


def test_too_late_for_grpc():
    """It has read the environment when it was imported: saying otherwise now would have it abort loaders' workers."""
    values = run("import grpc\nfrom snello import cli\ncli.main(['check-data'])")
    assert KERNELS.keys() <= values.keys() and not GRPC.keys() & values.keys()


@pytest.mark.slow
def test_workers_are_forked_under_the_command_line():
    code = "from snello.data.loaders import _worker_context as context\nassert context() is None, context()"
    run("from snello import cli\ncli.main(['check-data'])\nimport grpc\n" + code)
    run(code)
    run("import grpc\n" + code.replace("is None", "== 'forkserver'"))


def test_torchrun_is_told_to_be_quiet():
    code = "from snello.environment import set_environment\nset_environment()"
    assert run(code, WORLD_SIZE="2")["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    assert "TORCH_CPP_LOG_LEVEL" not in run(code)


@pytest.mark.slow
def test_a_measuring_process_sets_its_own():
    code = "import contextlib, io, sys\nfrom snello.measure import process\nsys.stdin = io.StringIO('no request')\n"
    values = run(code + "with contextlib.suppress(ValueError): process._serve()")
    assert {name: values[name] for name in KERNELS} == KERNELS


@pytest.mark.parametrize("verb", ["finetune", "serve", "join"])
def test_large_blocks_go_back_where_the_settings_say_so(monkeypatch, verb):
    """For `join` the settings are the server's."""
    from snello import cli, devices

    calls: list[str] = []
    monkeypatch.setattr(devices, "return_large_blocks", lambda: calls.append("called"))
    recipe = FinetuneConfig(grad_checkpointing=True)
    monkeypatch.setattr("snello.finetuning.finetune", lambda config: None)
    monkeypatch.setattr("snello.split.server.command.serve", lambda config: None)
    monkeypatch.setattr("snello.split.client.join.join", lambda config, on_settings, on_end: on_settings(recipe))
    plain = replace(recipe, grad_checkpointing=False)
    assert cli.main([verb, *(["127.0.0.1:1"] if verb == "join" else ["--grad-checkpointing"])]) == 0
    assert calls == ["called"]
    monkeypatch.setattr("snello.split.client.join.join", lambda config, on_settings, on_end: on_settings(plain))
    assert cli.main([verb, *(["127.0.0.1:1"] if verb == "join" else [])]) == 0
    assert calls == ["called"]


def test_memory_is_that_of_the_container_where_it_has_less(monkeypatch):
    whole = total_memory()
    assert whole is not None and whole > 2**28
    monkeypatch.setattr(Path, "read_text", lambda self: f"{2**27}\n")
    assert total_memory() == 2**27
    monkeypatch.setattr(Path, "read_text", lambda self: "max\n")
    assert total_memory() >= whole
