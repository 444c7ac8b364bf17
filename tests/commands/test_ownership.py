"""No command writes into another command's results; the same command over its own output is fine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbench.cli import main
from flowbench.commands.bench import run_bench
from flowbench.commands.run_folder import KINDS, claim, contents, working_in
from flowbench.core.rows import Row, read_rows, write_rows
from flowbench.data import FlowDataModule

from .conftest import DIGITS

SMALL = DIGITS.replace("    nll: {class_path: flowbench.tasks.generation.NegativeLogLikelihood}\n", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder of each kind: a run, reference rows, other people's images, samples of a flow, a bench."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("digits.yaml").write_text(SMALL)
        images = FlowDataModule("digits").uint8_images("val", torch.arange(60))
        np.savez("images.npz", images.numpy())
        words = ["-c", "digits.yaml"]
        assert main(["fit", *words, "run.name=run", "--test"]) == 0
        assert main(["reference", *words, "run.dir=runs/reference"]) == 0
        evaluate = ["evaluate", "--samples", "images.npz", "--data", "digits", "--features", "identity"]
        assert main([*evaluate, "--name", "external"]) == 0
        assert main(["predict", *words, "run.name=run", "--num-samples", "2", "--output", "runs/predict"]) == 0
        (folder / "runs" / "bench").mkdir()
        (folder / "runs" / "bench" / "plan.json").write_text(json.dumps({"name": "b"}))
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def commands(target: str) -> dict[str, list[str]]:
    """A command of each kind that writes into a folder."""
    evaluate = ["evaluate", "--samples", "images.npz", "--data", "digits", "--features", "identity"]
    return {
        "run": ["fit", "-c", "digits.yaml", f"run.dir={target}", "--test"],
        "reference": ["reference", "-c", "digits.yaml", f"run.dir={target}"],
        "external": [*evaluate, "--output", target],
        "predict": ["predict", "-c", "runs/run/config.yaml", "--num-samples", "2", "--output", target],
        "bench": ["bench", "-c", "bench.yaml", f"run_dir={target}"],
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("flowbench: error: "), err
    assert err.count("\n") == 1, err
    return err.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_every_folder_carries_whose_it_is(place, kind):
    found, words = contents(place / "runs" / kind)
    assert found == kind
    assert "\n" not in words
    assert words


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("command", KINDS)
def test_a_command_refuses_the_folder_of_another(here, capsys, command, there):
    if command == there:
        pytest.skip("its own")
    folder = here / "runs" / there
    (here / "bench.yaml").write_text("contenders: {a: digits.yaml}\nseeds: [0]\nbudget: {steps: 2}\n")
    before = files(folder)
    assert main(commands(f"runs/{there}")[command]) == 2
    said = line(capsys)
    assert f"runs/{there} holds " in said
    assert "give another " in said
    now = files(folder)
    assert {name: now.get(name) for name in before} == before
    assert now.keys() - before.keys() <= {"lock"}


@pytest.mark.parametrize("kind", ["run", "reference", "external", "predict"])
def test_the_same_command_over_its_own_output_is_fine(here, kind):
    words = commands(f"again/{kind}")[kind]
    assert main(words) == 0
    names = files(here / "again" / kind).keys()
    assert main(words) == 0
    assert files(here / "again" / kind).keys() == names


def test_samples_named_like_a_run_do_not_take_its_place(here, capsys):
    """The default folder of evaluate is that of a run of the same name."""
    rows = (here / "runs" / "run" / "rows.jsonl").read_bytes()
    shutil.copy("images.npz", "run.npz")
    assert main(["evaluate", "--samples", "run.npz", "--data", "digits", "--features", "identity"]) == 2
    assert "runs/run holds a trained run, which this would mix with images that other code made" in line(capsys)
    assert (here / "runs" / "run" / "rows.jsonl").read_bytes() == rows


def test_other_images_of_the_same_name_keep_the_earlier_rows(here, capsys):
    words = ["--data", "digits", "--features", "identity", "--name", "external"]
    shutil.copy("images.npz", "moved.npz")
    assert main(["evaluate", "--samples", "moved.npz", *words]) == 0
    assert not (here / "runs" / "external" / "before").exists()
    capsys.readouterr()
    np.savez("other.npz", np.load("images.npz")["arr_0"][::-1])
    assert main(["evaluate", "--samples", "other.npz", *words]) == 0
    assert "the earlier results in runs/external are of something else (config_hash " in capsys.readouterr().err
    (kept,) = (here / "runs" / "external" / "before").iterdir()
    hashes = [{row.provenance["config_hash"] for row in read_rows(f / "rows.jsonl")} for f in (kept, kept.parents[1])]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize("output", ["pictures", "pictures/scores"])
def test_rows_do_not_go_among_the_images(here, capsys, output):
    (here / "pictures").mkdir()
    words = ["evaluate", "--samples", "pictures", "--data", "digits", "--features", "identity", "--output", output]
    assert main(words) == 2
    assert f"{output} lies in the samples, which would hold its pictures too: give another --output" in line(capsys)


def test_references_of_a_run_lie_beside_it(here):
    rows = (here / "runs" / "run" / "rows.jsonl").read_bytes()
    assert main(["reference", "-c", "digits.yaml", "run.name=run"]) == 0
    assert (here / "runs" / "run" / "rows.jsonl").read_bytes() == rows
    families = {row.family for row in read_rows(here / "runs" / "run" / "reference" / "rows.jsonl")}
    assert families == {"reference"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "reconstruct"], "holds what --task sample made with runs/run/checkpoints/last.ckpt"),
        (["--ckpt", "other.ckpt"], "holds what --task sample made with runs/run/checkpoints/last.ckpt"),
    ],
)
def test_samples_of_another_flow_or_task_stay(here, capsys, words, expected):
    shutil.copy("runs/run/checkpoints/last.ckpt", "other.ckpt")
    before = files(here / "runs" / "predict")
    assert (
        main(["predict", "-c", "runs/run/config.yaml", "--num-samples", "2", "--output", "runs/predict", *words]) == 2
    )
    assert expected in line(capsys)
    assert files(here / "runs" / "predict") == before


@pytest.mark.parametrize("name", ["samples.npz", "grid.png", "manifest.json"])
def test_files_of_others_are_not_written_over(here, capsys, name):
    (here / "mine").mkdir()
    (here / "mine" / name).write_text("{}")
    (here / "mine" / "notes.txt").write_text("beside it, no harm is done")
    words = ["predict", "-c", "runs/run/config.yaml", "--num-samples", "2", "--output", "mine"]
    assert main(words) == 2
    assert f"mine holds {name}, which predict did not write: give another --output" in line(capsys)
    (here / "mine" / name).unlink()
    assert main(words) == 0
    assert (here / "mine" / "notes.txt").read_text() == "beside it, no harm is done"


def test_predict_does_not_write_over_what_it_reads(here, capsys):
    (here / "in").mkdir()
    images = FlowDataModule("digits").uint8_images("val", torch.arange(2)).numpy()
    np.savez(here / "in" / "reconstruct.npz", x=images, label=np.zeros(2, int))
    words = ["predict", "-c", "runs/run/config.yaml", "--task", "reconstruct", "--images", "in/reconstruct.npz"]
    assert main([*words, "--num-samples", "2", "--output", "in"]) == 2
    assert "in/reconstruct.npz would be written over while it is read" in line(capsys)


def test_a_configuration_of_the_users_own_is_not_replaced(here, capsys):
    """A run in the folder where the experiment lies, under the name that runs give theirs."""
    (here / "project").mkdir()
    shutil.copy("digits.yaml", "project/config.yaml")
    before = (here / "project" / "config.yaml").read_bytes()
    assert main(["fit", "-c", "project/config.yaml", "run.dir=project"]) == 2
    assert "project holds a config.yaml that flowbench did not write" in line(capsys)
    assert (here / "project" / "config.yaml").read_bytes() == before


def test_statistics_take_the_place_of_the_same_ones_only(here, capsys):
    words = ["stats", "--data", "digits", "--features", "identity", "--output", "s.npz"]
    assert main([*words, "--split", "val"]) == 0
    assert main([*words, "--split", "val"]) == 0
    before = Path("s.npz").read_bytes()
    assert main([*words, "--split", "test"]) == 2
    assert "s.npz holds other statistics (split 'val', now 'test'" in line(capsys)
    assert main([*words, "--samples", "images.npz"]) == 2
    capsys.readouterr()
    assert Path("s.npz").read_bytes() == before
    assert (
        main(["stats", "--data", "digits", "--features", "identity", "--samples", "images.npz", "-o", "images.npz"])
        == 2
    )
    assert "images.npz exists and holds no statistics of features" in line(capsys)


def test_a_bench_does_not_move_into_a_run(here):
    (here / "bench.yaml").write_text(
        "contenders: {a: digits.yaml}\nseeds: [0]\nbudget: {steps: 2}\nrun_dir: runs/run\n"
    )
    with pytest.raises(ValueError, match="runs/run holds a trained run, which this would mix with a bench"):
        run_bench("bench.yaml", dry_run=True)


def test_rows_that_cannot_be_read_are_moved_away_and_not_lost(here, capsys):
    (here / "runs" / "run" / "rows.jsonl").write_text("{damaged\n")
    assert main(["test", "-c", "digits.yaml", "run.name=run"]) == 0
    assert "the earlier results in runs/run cannot be read: they are kept in runs/run/before/unreadable" in (
        capsys.readouterr().err
    )
    assert (here / "runs" / "run" / "before" / "unreadable" / "rows.jsonl").read_text() == "{damaged\n"


def test_folders_of_earlier_versions_are_recognised_by_their_rows(tmp_path):
    row = {
        "bench": "", "problem": "", "contender": "x", "dataset": "d", "seed": 0, "metric": "m", "value": 1.0, "n": 1,
        "protocol": "p", "unit": "", "network_evaluations": None, "weights": "none",
    }  # fmt: skip
    for family, kind in (("external", "external"), ("reference", "reference"), ("TARFlow", "run")):
        write_rows(tmp_path / family / "rows.jsonl", [Row(**row, family=family)])
        assert contents(tmp_path / family)[0] == kind
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    assert contents(tmp_path / "photos") is None
    claim(tmp_path / "photos", "run", "")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    for name in (".rows.jsonl.abc123", ".progress.json.x1", "checkpoints/.last.ckpt.zz", ".notes.txt.old", ".git"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    with working_in(tmp_path):
        pass
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".git", ".notes.txt.old", "lock"]


def test_a_refusal_leaves_no_new_folder_and_what_was_there_stays(tmp_path):
    def refused(name: str, written: str = "") -> list[str]:
        with pytest.raises(ValueError, match="no"), working_in(tmp_path / name):
            if written:
                (tmp_path / name / written).touch()
            raise ValueError("no")
        return sorted(path.name for path in (tmp_path / name).glob("*"))

    (tmp_path / "old").mkdir()
    assert refused("old") == ["lock"]
    assert refused("new", "rows.jsonl") == ["lock", "rows.jsonl"]
    refused("other")
    assert not (tmp_path / "other").exists()
