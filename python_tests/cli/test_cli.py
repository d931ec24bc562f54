"""`fgvc-ext`: what its commands print, and its exit status: 0 well, 1 a problem, 2 used wrongly."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import fgvc_ext
from fgvc_ext.cli import main

Output = pytest.CaptureFixture[str]


def image_folder(root: Path) -> Path:
    """Two classes of three pictures, in a train and a test split, all different."""
    for number, place in enumerate(f"{split}/{name}" for split in ("train", "test") for name in ("robin", "wren")):
        (root / place).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (16, 12), (40 * number, 50 * index, 90)).save(root / place / f"{index}.png")
    return root


def test_info_prints_every_fact_in_two_columns(capsys: Output) -> None:
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = fgvc_ext.info()
    assert [line.split("  ")[0] for line in lines] == list(facts)
    column = lines[0].index(fgvc_ext.__version__)
    assert [line[column:] for line in lines] == [str(value) for value in facts.values()]
    assert all(line[column - 1] == " " for line in lines)


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "fgvc_ext.cli"]
    environment = {"PYTHONPATH": str(Path(fgvc_ext.__file__).parents[1])}
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, f"fgvc_ext {fgvc_ext.__version__}\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["infos"], "invalid choice: 'infos'"),
        (["data"], "ACTION"),
        (["data", "check"], "dataset"),
        (["data", "check", "motorcycles"], "invalid choice: 'motorcycles'"),
        (["data", "check", "cub"], "'cub' needs ROOT"),
        (["data", "check", "synthetic", "somewhere"], "takes no ROOT, got 'somewhere'"),
    ],
)
def test_wrong_use_is_status_2(arguments: list[str], message: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_data_check_of_a_sound_folder(tmp_path: Path, capsys: Output) -> None:
    assert main(["data", "check", "folder", str(image_folder(tmp_path))]) == 0
    output = capsys.readouterr().out
    assert "train: 6 images, 2 classes" in output
    assert "test: 6 images, 2 classes" in output


def test_data_check_of_a_folder_with_a_validation_split_alone(tmp_path: Path, capsys: Output) -> None:
    (image_folder(tmp_path) / "test").rename(tmp_path / "val")
    assert main(["data", "check", "folder", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "no folder 'test': 'val' is what a model is evaluated on" in output
    assert "val: 6 images, 2 classes" in output


def test_data_check_counts_errors_and_warnings(tmp_path: Path, capsys: Output) -> None:
    (image_folder(tmp_path) / "train" / "wren" / "notes.txt").write_text("no image")
    shutil.copyfile(tmp_path / "train" / "wren" / "0.png", tmp_path / "train" / "wren" / "again.png")
    assert main(["data", "check", "folder", str(tmp_path)]) == 0, "nothing here spoils a training"
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warnings if "duplicate" in line] == ["duplicate image"]
    assert any("1 files left out for their endings" in line for line in warnings)
    assert lines[-1] == f"0 errors, {len(warnings)} warnings"
    shutil.copyfile(tmp_path / "train" / "wren" / "1.png", tmp_path / "test" / "wren" / "1.png")
    assert main(["data", "check", "folder", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"1 errors, {len(warnings)} warnings"
    assert sum(line.startswith("error: image in two splits") for line in lines) == 1


def test_data_check_names_a_broken_file(tmp_path: Path, capsys: Output) -> None:
    broken = image_folder(tmp_path) / "train" / "wren" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert main(["data", "check", "folder", str(tmp_path)]) == 1
    assert str(broken) in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["folder", "cub"])
def test_a_missing_root_is_status_1_and_named(dataset: str, tmp_path: Path, capsys: Output) -> None:
    missing = tmp_path / "nowhere"
    assert main(["data", "check", dataset, str(missing)]) == 1
    captured = capsys.readouterr()
    assert str(missing) in captured.out + captured.err


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    for name in [name for name in sys.modules if name.startswith(("fgvc_ext.data", "fgvc_ext.cli.data"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["data", "check", "synthetic"]) == 1
    assert "pip install 'fgvc_ext[train]'" in capsys.readouterr().err
