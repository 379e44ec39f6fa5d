"""What others may rely on: names, docstrings, and that importing is light."""

import ast
import importlib
import inspect
import json
import pkgutil
from pathlib import Path

import pytest
from conftest import run_python

import snello

HEAVY = ("torch", "torchvision", "timm", "accelerate", "numpy", "matplotlib", "PIL", "safetensors")
LOADED = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"

EXTRAS = {
    "snello.integrations.lightning": "lightning",
    "snello.integrations.transformers": "transformers",
    "snello.models.transformers_models": "transformers",
    "snello.vit.transformers_family": "transformers",
}
"""Modules that cannot be imported without a package that snello does not require."""


def loaded_after(code: str) -> list[str]:
    """The heavy modules that are loaded after `code`, in a process of its own."""
    result = run_python("-c", f"{code}\n{LOADED}")
    assert result.returncode == 0, result.stderr
    heavy: list[str] = json.loads(result.stdout.splitlines()[-1])
    return heavy


def modules() -> list[str]:
    found = pkgutil.walk_packages(snello.__path__, "snello.")
    return ["snello", *(module.name for module in found)]


@pytest.mark.parametrize("name", snello.__all__)
def test_public_names(name):
    value = getattr(snello, name)
    assert callable(value) and inspect.getdoc(value)
    assert getattr(importlib.import_module(value.__module__), value.__name__) is value


def test_all_is_complete_and_star_import_works():
    configs = "Alast Augment Certs CheckData Codecs Columns Doctor Evaluate Export Finetune Join Lora Pictures Plan"
    errors = "Authentication Checkpoint Config Data Model Network Protocol Snello Training"
    others = "ALaST Predictor Recipe Report SnelloWarning ViT evaluate export_run finetune load plan predict report"
    expected = {f"{name}Config" for name in (*configs.split(), "Predict", "Report", "Serve", "Split")}
    expected |= {*(f"{name}Error" for name in errors.split()), *others.split()}
    assert set(snello.__all__) == expected and len(snello.__all__) == len(expected)
    names: dict[str, object] = {}
    exec("from snello import *", names)
    assert set(snello.__all__) <= set(names)
    assert snello.plan.__name__ == "make_plan" and snello.export_run.__name__ == "export"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        snello.nothing  # noqa: B018


@pytest.mark.slow
def test_the_package_export_hides_no_function():
    """Whichever is asked for first."""
    code = (
        "import snello\nfrom snello import export_run, export\nassert export.export is export_run is snello.export_run"
    )
    for lines in (code, "import snello.export\n" + code):
        assert run_python("-c", lines).returncode == 0


def test_type_checkers_are_told_what_is_imported():
    (block,) = [node for node in ast.parse(inspect.getsource(snello)).body if isinstance(node, ast.If)]
    told = {name.asname or name.name: f"{node.module}:{name.name}" for node in block.body for name in node.names}
    assert told == snello._LAZY and set(told) <= set(snello.__all__)


def test_version():
    from importlib.metadata import version

    assert snello.__version__ == version("snello")


@pytest.mark.parametrize("name", modules())
def test_everything_public_has_a_docstring(name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    module = importlib.import_module(name)
    assert module.__doc__
    for item, value in vars(module).items():
        if item.startswith("_") or getattr(value, "__module__", None) != name:
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert value.__doc__, f"{name}.{item}"
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if method.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
                    continue
                said = getattr(function, "fget", function)
                assert function.__doc__ or hasattr(said, "__override__"), f"{name}.{item}.{method}"


def test_errors_share_a_base():
    errors = importlib.import_module("snello.errors")
    classes = [value for value in vars(errors).values() if getattr(value, "__module__", "") == errors.__name__]
    classes = [value for value in classes if inspect.isclass(value)]
    warning = errors.SnelloWarning
    assert len(classes) == 10 and all(issubclass(cls, snello.SnelloError) for cls in classes if cls is not warning)
    assert issubclass(errors.ConfigError, ValueError)


def test_import_is_light():
    assert loaded_after("import snello") == []
    assert loaded_after("import snello; snello.FinetuneConfig(); snello.SnelloError") == []


@pytest.mark.parametrize(
    "args",
    [
        ["--help"], ["--version"], ["--print-completion", "bash"], ["finetune", "--help"], ["serve", "--help-all"],
        ["finetune", "--lr", "-1"], ["finetune", "--bogus"], ["x"],
    ],
)  # fmt: skip
def test_help_and_refusals_are_light(args):
    code = (
        "import contextlib, io\nfrom snello import cli\n"
        f"with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): cli.main({args!r})"
    )
    assert loaded_after(code) == []


@pytest.mark.parametrize("imports", ["import snello, timm", "import timm, snello", "import timm.models, snello"])
@pytest.mark.slow
def test_micro_model_is_registered(imports):
    """Whichever is imported first, and with nothing else of snello imported."""
    code = (
        f"{imports}\nimport timm\nmodel = timm.create_model('vit_micro_patch4_32', num_classes=7)\n"
        "assert timm.is_model('vit_micro_patch4_32') and len(model.blocks) == 12 and model.num_classes == 7\n"
        "print(sum(p.numel() for p in model.parameters()))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert 2.3e6 < int(result.stdout) < 2.5e6


def test_package_says_that_it_is_typed():
    assert (Path(snello.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(("host", "extra"), [("transformers", "hf"), ("lightning", "lightning")])
def test_a_missing_host_is_one_line_with_the_command(host, extra):
    code = f"import sys; sys.modules[{host!r}] = None; import snello.integrations.{host}"
    last = run_python("-c", code).stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: snello.integrations.{host} needs {host} (")
    assert last.endswith(f"is missing): pip install 'snello[{extra}]'")


def test_no_two_test_files_have_one_name() -> None:
    """Folders of tests are no packages, so pytest could import only one of them."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert names == sorted(set(names))
