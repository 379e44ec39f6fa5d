"""The command line: what cannot be used is one line on stderr and exit code 2, and leaves nothing behind."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import QUIET, finetune, flags, run_python, with_method, write_pictures
from safetensors import SafetensorError
from safetensors.torch import save_file

from snello import cli, files
from snello.runs.folder import RunFolder


@pytest.fixture
def refused(capfd, small, tmp_path, monkeypatch):
    """Runs the arguments; they must be refused in one line, which is returned, and leave no run folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a run without --out would be; a clone may have some already

    def call(*args: str, verb: str = "finetune") -> str:
        capfd.readouterr()
        before = {path: path.stat().st_mtime_ns for path in small.out.parent.rglob("*")}
        assert cli.main([verb, *args]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.endswith("\n") and err.count("\n") == 1, err
        assert {path: path.stat().st_mtime_ns for path in small.out.parent.rglob("*")} == before
        prefix, text = err[:15], err[15:-1]
        assert prefix == "snello: error: " and text.strip() and "Traceback" not in text
        return text

    return call


# ------------------------------------------------------------------------------------------------- settings and flags


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--lr", "-1"], "--lr must be above 0 and finite, got -1.0"),
        (["--lr=-1"], "--lr must be above 0 and finite, got -1.0"),
        (["--alast.start-budget", "1.5"], "--alast.start-budget must be in (0, 1], got 1.5"),
        (["--alast.min-budget", "0"], "--alast.min-budget must be in (0, 1], got 0.0"),
        (["--method", "alast", "--alast.blocks", "7"], "--alast.blocks must be in 1..6 (the model's depth), got 7"),
        (["--method", "last-k", "--last-k", "7"], "--last-k must be in 1..6 (the model's depth), got 7"),
        (["--image-size", "50"], "--image-size for test_vit must be a multiple of its patch size 16, got 50"),
        (["--image-size", "8"], "must be a multiple of its patch size 16, got 8"),
        (["--bogus", "3"], "--bogus"),
        (["--epo", "3"], "--epo"),
        (["stray"], "stray"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--epochs"], "--epochs"),
        (["--seed", str(2**64)], "--seed"),
        (["--method", "lorax"], "--method"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--precision", "int8"], "--precision"),
        (["--device", "banana"], "--device must be auto, cpu, cuda, cuda:N or mps, got 'banana'"),
        (["--device", "cuda:77"], "--device cuda:77: this machine has no such device"),
        (["--device", "meta"], "--device meta: this machine has no such device"),
        (["--model", "vit_smal_patch16_224"], "unknown model 'vit_smal_patch16_224'; nearest: vit_small_patch16_224"),
        (["--model", "resnet18"], "model ResNet is not supported; supported: "),
        (["--model", ""], "unknown model ''"),
        (["--model", "vit_tiny_patch16_224.nonsense"], "unknown pretrained tag"),
        (["--weights", "/no/such/file"], "there is no file /no/such/file"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file or directory"),
    ],
)
def test_setting_that_cannot_be_used(small, refused, args, told):
    assert told in refused(*flags(small), *args)


def test_unknown_verb(refused):
    assert "unknown verb 'dance'; known: finetune, evaluate, predict" in refused(verb="dance")


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_other_verbs_refuse_in_one_line_too(refused, verb):
    assert "Run folder" in refused(verb=verb)
    assert "--bogus" in refused("run", "picture.png", "--bogus", "1", verb=verb)


def test_pretrained_weights_that_cannot_be_loaded(small, refused):
    """The tests run offline (HF_HUB_OFFLINE=1, see conftest.py)."""
    text = refused(*flags(replace(small, model="deit_tiny_patch16_224", weights="pretrained", image_size=None)))
    assert "the pretrained weights of deit_tiny_patch16_224 could not be loaded" in text
    assert "offline?" in text and "--weights FILE" in text


def test_weights_of_another_shape(small, refused, tmp_path):
    import timm

    state = timm.create_model("test_vit", img_size=48).state_dict()
    file = tmp_path / "w.safetensors"
    save_file({**state, "norm.weight": torch.ones(7)}, file)
    text = refused(*flags(replace(small, weights=str(file))))
    assert f"{file} does not fit the model" in text and "norm.weight is (7,), the model's is (64,)" in text
    del state["norm.bias"]
    save_file(state, file)
    assert "norm.bias is missing" in refused(*flags(replace(small, weights=str(file))))
    file.write_bytes(b"nothing of the kind")
    assert f"{file} cannot be read" in refused(*flags(replace(small, weights=str(file))))


# ------------------------------------------------------------------------------------------------------------ pictures


def test_data_that_cannot_be_used(small, refused, tmp_path):
    def error(name: str, *args: str) -> str:
        return refused(*flags(replace(small, data=tmp_path / name)), *args)

    assert "missing: no such folder" in error("missing")
    (tmp_path / "empty").mkdir()
    assert "empty: empty; put the pictures" in error("empty")
    write_pictures(tmp_path / "one", {"cat": 3})
    assert "only one class (cat)" in error("one")
    (tmp_path / "none" / "cat").mkdir(parents=True)
    (tmp_path / "none" / "dog").mkdir()
    assert "no pictures in its class folders" in error("none")
    write_pictures(tmp_path / "differ" / "train", {"cat": 3, "dog": 3})
    write_pictures(tmp_path / "differ" / "val", {"cat": 3, "cow": 3})
    assert "train/ and val/ differ in classes, only in train/: dog; only in val/: cow" in error("differ")
    write_pictures(tmp_path / "bad", {"cat": 3, "dog": 3})
    (tmp_path / "bad" / "dog" / "001.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert "dog/001.png: cannot be read as a picture" in error("bad")
    assert "--skip-bad leaves them out" in error("bad")


@pytest.mark.slow
def test_bad_picture_that_nobody_looked_for(small, tmp_path, capfd):
    """Without the check at the start it is found in the middle, in a loader: still one line, and the run stays."""
    data = write_pictures(tmp_path / "data", {"a": 6, "b": 6})
    for path in (data / "a").iterdir():
        path.write_bytes(b"no picture")
    assert cli.main(["finetune", *flags(replace(small, data=data, check_pictures=False, workers=1))]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"snello: error: {data}/a/") and "cannot be read as a picture" in line
    assert RunFolder(small.out).config_file.exists()


# ------------------------------------------------------------------------------------------------------- run folders


def test_run_folder_in_use(small, refused):
    small.out.mkdir()
    (small.out / "thesis.tex").write_text("x")
    text = refused(*flags(small))
    assert f"--out {small.out} is not empty" in text and "--resume" in text
    assert [path.name for path in small.out.iterdir()] == ["thesis.tex"]


def test_run_folder_that_cannot_be_made(small, refused, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "is not empty" in refused(*flags(replace(small, out=tmp_path / "file")))
    assert "cannot be created" in refused(*flags(replace(small, out=tmp_path / "file" / "run")))


def test_empty_run_folder_is_used(small):
    small.out.mkdir()
    assert cli.main(["finetune", *flags(replace(small, epochs=1))]) == 0
    assert RunFolder(small.out).summary_file.exists()


def test_nothing_to_resume(small, refused):
    assert "--resume needs --out" in refused("--resume")
    assert f"--resume: {small.out} holds no run (no config.yaml)" in refused("--resume", "--out", str(small.out))
    assert not small.out.exists()


def test_resume_with_other_settings(small, refused):
    finetune(replace(small, epochs=1), QUIET)
    text = refused("--out", str(small.out), "--resume", "--lr", "0.25", "--augment.no-flip", "--compare")
    assert "was made with another config: lr was 0.0005, now 0.25, augment.flip was True, now False" in text


def test_resume_by_name_alone(small, capfd):
    """Everything else is in the run's config.yaml."""
    assert cli.main(["finetune", *flags(replace(small, epochs=1, seed=5))]) == 0
    assert cli.main(["finetune", "--resume", "--out", str(small.out)]) == 0
    assert "the run was already complete" in capfd.readouterr().err


def test_new_run_from_the_config_of_another(small, tmp_path):
    assert cli.main(["finetune", *flags(replace(small, epochs=1))]) == 0
    file, other = RunFolder(small.out).config_file, tmp_path / "other"
    assert cli.main(["finetune", "--config", str(file), "--out", str(other)]) == 0
    one, two = (RunFolder(path).read() for path in (small.out, other))
    assert replace(one[0], out=None) == replace(two[0], out=None) and one[1] == two[1]
    assert files.load_tensors(small.out / "model.safetensors")[0].keys()
    first, second = (files.load_tensors(path / "model.safetensors")[0] for path in (small.out, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# ------------------------------------------------------------------------------------------------------ a full disk


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("os error 28")])
@pytest.mark.slow
def test_full_disk(small, monkeypatch, capfd, error):
    """Saving the second checkpoint fails: the first survives byte for byte, and the run can go on from it."""
    save, saved = files.save_file, []

    def full(tensors, filename, metadata):
        if len(saved) == 1:
            Path(filename).write_bytes(b"as far as it went")
            raise error
        save(tensors, filename, metadata)
        saved.append(Path(filename).read_bytes())

    monkeypatch.setattr(files, "save_file", full)
    assert cli.main(["finetune", *flags(replace(small, checkpoint_steps=3))]) == 2
    err = capfd.readouterr().err.splitlines()
    (line,) = [line for line in err if line.startswith("snello: error: ")]
    assert line == err[-1] and "could not save" in line and str(error) in line and "the one before is untouched" in line
    assert RunFolder(small.out).checkpoint_file.read_bytes() == saved[0]
    assert not list(small.out.glob(".*"))
    assert len(list(RunFolder(small.out).rows("step"))) == 6
    monkeypatch.undo()
    assert cli.main(["finetune", "--out", str(small.out), "--resume"]) == 0


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX")
def test_file_system_that_takes_no_more(small, capfd):
    """Not a mock: the kernel lets no file grow beyond what the config needs."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        assert cli.main(["finetune", *flags(replace(small, checkpoint_steps=3))]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"snello: error: could not save {small.out / 'last.safetensors'}: ")
    assert "(nothing was written)" in line
    assert {path.name for path in small.out.iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_metrics_that_cannot_be_written(small, monkeypatch, capfd):
    opened = Path.open

    def full(self, mode="r", **kwargs):
        if self.name == "metrics.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    assert cli.main(["finetune", *flags(small)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"snello: error: could not write {small.out / 'metrics.jsonl'}: No space left on device" + (
        "; free space, then resume with --resume"
    )


def test_plot_that_cannot_be_written(small, monkeypatch, capfd):
    from matplotlib.figure import Figure

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    assert cli.main(["finetune", *flags(with_method(small, method="alast", epochs=1))]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"snello: error: could not save {small.out / 'budgets.png'}: ")
    assert RunFolder(small.out).summary_file.exists()


# ------------------------------------------------------------------------------------------------------ help and output


def test_help(capsys):
    for args in ([], ["--help"], ["-h"]):
        assert cli.main(args) == 0
        out = capsys.readouterr().out
        assert all(verb in out for verb in ("finetune", "evaluate", "predict", "usage: snello VERB"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("snello ")


def test_help_of_a_command_that_is_wrong(capsys):
    for args in (["--config", "/no/such.yaml", "--help"], ["--bogus", "-h"], ["--method", "lorax", "--help-all"]):
        assert cli.main(["finetune", *args]) == 0
        assert "--lr FLOAT" in capsys.readouterr().out


def test_an_error_in_a_terminal_without_signs_for_boxes():
    """Tyro draws its box with dashes there."""
    done = run_python("-m", "snello.cli", "finetune", "--lr", "-1", PYTHONIOENCODING="ascii")
    line = "snello: error: --lr must be above 0 and finite, got -1.0 (snello finetune --help-all lists the options)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_progress_goes_to_stderr(small, capfd):
    assert cli.main(["finetune", *flags(replace(small, epochs=1))]) == 0
    out, err = capfd.readouterr()
    assert out == "" and "epoch 1: accuracy" in err and f"run folder: {small.out}" in err


@pytest.mark.slow
def test_installed_command(small):
    """In a process of its own: exit code, streams, and nothing of libraries in between."""
    result = run_python("-m", "snello.cli", "finetune", *flags(replace(small, epochs=1)), "--lr", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "--lr must be above 0" in result.stderr
    result = run_python("-W", "error::DeprecationWarning:snello", "-m", "snello.cli", "finetune", *flags(small))
    assert (result.returncode, result.stdout) == (0, "")
    assert "Warning" not in result.stderr and RunFolder(small.out).summary_file.exists()
