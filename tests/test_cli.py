"""The command line: exit statuses, one clear line for every bad input, interruption of a real process."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from ntm_fast import __version__
from ntm_fast.cli import main
from ntm_fast.tasks import CopyTask
from ntm_fast.training import loop
from ntm_fast.training.checkpoint import load_checkpoint

TINY = (
    "--bits 1 --max-length 1 --hidden-size 8 --memory-locations 8 --memory-width 4 --learning-rate 3e-3 "
    "--validate-every 160 --engine reference --threads 1 --quiet"
).split()


@pytest.fixture
def short_evaluation(monkeypatch):
    monkeypatch.setattr(loop, "EVALUATION_SEQUENCES", 2)
    monkeypatch.setattr(CopyTask, "cases", (2, 5))


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A solved run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "solved"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "EVALUATION_SEQUENCES", 2)
        assert main(["train", "copy", *TINY, "--out", str(folder)]) == 0
    return folder


def refused(capsys, arguments, *texts, status=2):
    """The command fails with ``status`` and one line on stderr, with these texts in it."""
    capsys.readouterr()
    assert main(arguments) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("ntm-fast"), err
    for text in texts:
        assert text in err


# --- train ------------------------------------------------------------------------------------------------------------


def test_solved(solved):
    summary = json.loads((solved / "summary.json").read_text())
    assert summary["solved"] is True and summary["error"] < 0.01
    assert set(summary["error_at_length"]) == {"10", "20", "30", "50", "100"}
    assert sorted(path.name for path in solved.iterdir()) == [
        "checkpoint.safetensors",
        "config.json",
        "learning_curve.png",
        "memory.png",
        "metrics.csv",
        "summary.json",
    ]


def test_not_solved_then_resumed(tmp_path, capsys, short_evaluation):
    folder = str(tmp_path / "run")
    assert main(["train", "copy", *TINY, "--max-sequences", "64", "--out", folder]) == 3
    out, err = capsys.readouterr()
    assert out.startswith("not solved within 64 sequences: ") and err == ""
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["solved"] is False
    assert main(["train", "copy", "--resume", folder, "--max-sequences", "20000", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("solved: ")
    assert main(["train", "copy", "--resume", folder, "--quiet"]) == 0, "a solved run stays solved"


def test_default_folder_and_progress_bar(tmp_path, capsys, monkeypatch, short_evaluation):
    monkeypatch.chdir(tmp_path)
    arguments = [word for word in TINY if word != "--quiet"] + ["--learning-rate", "1e-9"]
    assert main(["train", "copy", *arguments, "--controller", "gru", "--seed", "4", "--max-sequences", "320"]) == 3
    assert (tmp_path / "runs" / "copy-gru-seed4" / "summary.json").exists()
    bar = capsys.readouterr().err
    for text in ("copy gru", "320/320", "loss 0.", " bits a sequence, ", " seq/s"):
        assert text in bar


@pytest.mark.parametrize(
    "arguments, texts",
    [
        ([], ["COMMAND"]),
        (["fly"], ["'fly'"]),
        (["train"], ["TASK"]),
        (["train", "juggle"], ["'juggle'", "copy"]),
        (["train", "copy", "--controller", "rnn"], ["--controller", "'rnn'", "lstm"]),
        (["train", "copy", "--engine", "warp"], ["--engine", "'warp'", "reference"]),
        (["train", "copy", "--batch-size", "many"], ["--batch-size", "'many'", "int"]),
        (["train", "copy", "--batch-size", "-3"], ["batch_size: got -3, expected an int of at least 1"]),
        (["train", "copy", "--max-length", "0"], ["max_length: got 0, expected an int of at least 1"]),
        (["train", "copy", "--learning-rate", "nan"], ["learning_rate: got nan, expected a number above 0"]),
        (["train", "copy", "--device", "teapot"], ["device: got 'teapot'"]),
        (["train", "copy", "--shift-range", "64"], ["shift_range: got 64", "memory_locations = 128"]),
        (["train", "copy", "--clip", "-1"], ["clip: got -1.0, expected a number above 0 or None"]),
        (["train", "copy", "--threads", "some"], ["--threads", "'some'", "int or none"]),
        (["train", "copy", "--read-first", "yes"], ["unrecognized arguments: yes"]),
        (["train", "copy", "--model", "abacus"], ["model: got 'abacus', expected one of 'ntm' or 'module:Class'"]),
        (["train", "copy", "--model"], ["--model", "expected one argument"]),
        (["train", "copy", "--resume", "nowhere"], ["there is no folder nowhere"]),
        (["train", "copy", "--resume", "."], ["config.json: cannot be read"]),
        (["train", "copy", "--resume", "a", "--out", "b"], ["--out b and --resume a"]),
        (["eval", "nowhere"], ["nowhere: there is no such folder"]),
        (["eval"], ["RUN"]),
        (["plot", "nowhere"], ["nowhere: there is no such folder"]),
        (["plot", "."], ["config.json: cannot be read"]),
        (["eval", ".", "--lengths", "5"], ["config.json: cannot be read"]),
        (["eval", ".", "--sequences", "-1"], ["--sequences: got -1"]),
    ],
)
def test_bad_usage(tmp_path, capsys, monkeypatch, arguments, texts):
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, *texts)
    assert not list(tmp_path.iterdir()), "something was written"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["plot", "--length", "0"], "--length: got 0"),
        (["eval", "--lengths", "5", "0"], "--lengths: got 0"),
        (["eval", "--lengths", "many"], "--lengths: invalid int value: 'many'"),
        (["eval", "--repeats", "5"], "unrecognized arguments: --repeats 5"),
        (["eval", "--engine", "warp"], "engine: got 'warp', expected one of 'auto', 'sequence', 'step', 'reference'"),
    ],
)
def test_bad_cases(solved, capsys, arguments, text):
    refused(capsys, [arguments[0], str(solved), *arguments[1:]], text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path, capsys):
    refused(capsys, ["train", "copy", "--device", "cuda", "--out", str(tmp_path / "run")], "device: got 'cuda'")
    assert not (tmp_path / "run").exists()


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "run")
    refused(capsys, ["train", "copy", *TINY, "--out", folder], folder, "cannot be written to: Not a directory")


def test_taken_folder(solved, capsys):
    before = {path.name: path.read_bytes() for path in solved.iterdir()}
    refused(capsys, ["train", "copy", *TINY, "--out", str(solved)], "already holds a run", "--resume")
    refused(capsys, ["train", "copy", "--resume", str(solved), "--hidden-size", "9"], "hidden_size: got 9, expected 8")
    assert {path.name: path.read_bytes() for path in solved.iterdir()} == before


def test_damaged_checkpoint(solved, tmp_path, capsys):
    for path in solved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -10 if path.suffix == ".safetensors" else None])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (["train", "copy", "--resume"], ["eval"], ["plot"]):
        refused(capsys, [*command, str(tmp_path)], "checkpoint.safetensors: is damaged or cut off")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CopyTask, "loss", lambda task, logits, batch: (logits * float("nan")).sum())
    arguments = ["train", "copy", *TINY, "--out", str(tmp_path / "run")]
    refused(capsys, arguments, "loss nan, gradient norm nan after 0 sequences", status=1)


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_a_real_process(tmp_path, number):
    options = [*TINY, "--learning-rate", "1e-9", "--max-sequences", "100000"]  # it will not be solved
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "ntm_fast", "train", "copy", *options, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert f"go on with: ntm-fast train copy --resume {folder}" in err and "Traceback" not in err
    stopped = load_checkpoint(folder / "checkpoint.safetensors").progress["sequences"]
    assert stopped >= 320 and not (folder / "summary.json").exists()

    # To the next row, in another process: the same as never having stopped.
    end = str(stopped // 160 * 160 + 320)
    assert main(["train", "copy", "--resume", str(folder), "--max-sequences", end, "--quiet"]) == 3
    assert main(["train", "copy", *options, "--max-sequences", end, "--out", str(tmp_path / "whole")]) == 3
    one, other = (load_checkpoint(path / "checkpoint.safetensors") for path in (folder, tmp_path / "whole"))
    assert one.progress["sequences"] == int(end)
    for group in ("model", "optimizer", "generators"):
        first, second = getattr(one, group), getattr(other, group)
        assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


# --- eval, plot, info -------------------------------------------------------------------------------------------------


def test_eval(solved, capsys):
    capsys.readouterr()
    assert main(["eval", str(solved), "--lengths", "1", "7", "--sequences", "10"]) == 0
    table = capsys.readouterr().out.split()
    assert table[:3] == ["length", "1", "7"] and float(table[-2]) == 0
    assert main(["eval", str(solved), "--lengths", "1", "7", "--sequences", "10", "--json"]) == 0
    errors = json.loads(capsys.readouterr().out)["error_at_length"]
    assert errors["1"] == 0 and float(table[-1]) == pytest.approx(errors["7"], rel=1e-2)


def test_plot(solved, capsys):
    picture = solved / "memory.png"
    before = picture.read_bytes()
    assert main(["plot", str(solved), "--length", "3"]) == 0
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes() != before
    assert main(["plot", "--length", "3", str(solved)]) == 0
    assert main(["plot", str(solved)]) == 0


def test_options_that_are_switches_or_none(tmp_path, capsys, short_evaluation, monkeypatch):
    monkeypatch.setattr(loop, "draw", lambda *args, **kwargs: [])
    arguments = ["train", "copy", *TINY, "--read-first", "--clip", "none", "--threads", "none", "--max-sequences", "8"]
    assert main([*arguments, "--out", str(tmp_path)]) == 3
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_options"]["read_first"] is True and config["model_options"]["clip"] is None
    assert config["threads"] is None
    again = ["train", "copy", "--resume", str(tmp_path), "--no-read-first"]
    refused(capsys, again, "read_first: got False, expected True as in")


def test_info(capsys, monkeypatch):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"ntm_fast  {__version__}\n" in out and torch.__version__ in out
    told = {
        "cpu": "x86-64-v3",
        "cpu_reason": None,
        "cuda": "80;90",
        "cuda_reason": "torch sees no CUDA device",
        "build": {"cxx": "g++ 12", "nvcc": None, "cpu": ["baseline", "x86-64-v3"]},
    }
    monkeypatch.setattr("ntm_fast.cli.capabilities", lambda: told)
    monkeypatch.setattr("ntm_fast.cli.explain", lambda device: {"read": "native", "sharpen": "reference: no kernel"})
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cpu       variant x86-64-v3" in lines
    assert "cuda      architectures 80;90; not in use: torch sees no CUDA device" in lines
    assert "build     cxx: g++ 12" in lines and "build     cpu: baseline, x86-64-v3" in lines
    assert "cpu ops   native: read" in lines and "          by the reference: sharpen" in lines


def test_as_a_module():
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "ntm_fast", *arguments], capture_output=True, text=True)

    assert run("--version").stdout == f"ntm_fast {__version__}\n"
    result = run("train", "copy", "--bits", "none")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["matplotlib", "tqdm", "safetensors"])
def test_missing_extras(tmp_path, missing):
    """Found before training, and the rest still works."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from ntm_fast.cli import main\n"
        "assert main(['info']) == 0\n"
        f"sys.exit(main(['train', 'copy', '--out', {str(tmp_path / 'run')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f'ntm-fast: {missing} is not installed: pip install "ntm-fast[train]"\n'
    assert not (tmp_path / "run").exists()
