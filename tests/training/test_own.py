"""Tasks and models of a user's own, from a module in the current folder, by the command line."""

import json
import sys

import pytest
from helpers.training import assert_same_run

from ntm_fast.cli import main
from ntm_fast.tasks import find_task
from ntm_fast.training import find_model, load_run

OWN = '''
from dataclasses import dataclass
import torch
from torch import nn
from ntm_fast.spec import option
from ntm_fast.tasks import Batch, BitTask

@dataclass(frozen=True)
class Echo(BitTask):
    """A bit at each of ``length`` steps, to be repeated ``repeats`` times at once."""

    copies: int = option(1, "most repeats in training", least=1)
    noisy: bool = False
    name, axes, cases, shown, input_size = "echo", ("length", "repeats"), ((2, 1), (3, 2)), (2, 1), 1

    @property
    def output_size(self):
        return self.copies + 1

    def batch(self, batch_size, generator, length=None, repeats=None):
        repeats = repeats or int(torch.randint(1, self.copies + 1, (), generator=generator))
        inputs = torch.randint(0, 2, (length or 3, batch_size, 1), generator=generator).float()
        targets = inputs * (torch.arange(self.output_size) < repeats)
        return Batch(inputs, targets, torch.ones(inputs.shape[:2], dtype=torch.bool))

@dataclass(frozen=True)
class Mean:
    """The mean so far of random numbers: no bits, and no axes."""

    name, unit, axes, cases, shown = "mean", "squared error", (), ((),), ()
    input_size, output_size, solved_below, validate_below = 1, 1, 1e-6, 1e-3

    def batch(self, batch_size, generator):
        inputs = torch.randn(5, batch_size, 1, generator=generator)
        counts = torch.arange(1, 6).view(-1, 1, 1)
        return Batch(inputs, inputs.cumsum(0) / counts, torch.ones(5, batch_size, dtype=torch.bool))

    def loss(self, outputs, batch):
        return (outputs - batch.targets).square().mean()

    def errors(self, outputs, batch):
        return (outputs - batch.targets).square().sum()

    def predictions(self, outputs):
        return outputs

class Module(nn.Module):
    def __init__(self, input_size, width, output_size, dtype):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(input_size, width, dtype=dtype), nn.Tanh(), nn.Linear(width, output_size, dtype=dtype)
        )

    def forward(self, inputs):
        return self.layers(inputs), None

@dataclass(frozen=True)
class Layers:
    """No memory at all."""

    width: int = option(16, "units", least=1)
    slope: float | None = option(None, "unused", optional=float, changeable=True)
    name, title = "layers", "two layers"

    def build(self, input_size, output_size, *, dtype):
        return Module(input_size, self.width, output_size, dtype)

class NoDataclass: pass

@dataclass(frozen=True)
class Half(BitTask):
    name = "half"

@dataclass(frozen=True)
class Odd(Mean):
    sizes: tuple = ()

@dataclass(frozen=True)
class Clash(Layers):
    copies: int = 1

@dataclass(frozen=True)
class Wide(Echo):
    input_size = 2

@dataclass(frozen=True)
class Tensor(Layers):
    def build(self, input_size, output_size, *, dtype):
        return nn.Linear(input_size, output_size, dtype=dtype)
'''
QUICK = ["--learning-rate", "0.01", "--validate-every", "160", "--threads", "1", "--quiet"]
SMALL_NTM = "--hidden-size 8 --memory-locations 8 --memory-width 4 --engine reference".split()


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The current folder, with a module ``own``."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("from __future__ import annotations\n" + OWN)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    yield tmp_path
    sys.modules.pop("own", None)


def said(capsys, status, *arguments):
    """What the command says, on stdout where it succeeds."""
    capsys.readouterr()
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    return err if status == 2 else out


def test_own_task(own, capsys):
    train = ["train", "own:Echo", "--copies", "2", "--noisy", *SMALL_NTM, *QUICK]
    out = said(capsys, 3, *train, "--max-sequences", "80", "--out", "half")
    assert "bits a sequence over 1,000 fresh sequences" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["length", "repeats", "bits"]
    said(capsys, 3, "train", "own:Echo", "--resume", "half", "--max-sequences", "320", "--quiet")
    said(capsys, 3, *train, "--max-sequences", "320", "--out", "whole")
    assert_same_run(own / "half", own / "whole")
    summary = json.loads((own / "whole" / "summary.json").read_text())
    assert summary["error_at_length_repeats"].keys() == {"2,1", "3,2"}
    assert (summary["copies"], summary["noisy"]) == (2, True)
    errors = json.loads(said(capsys, 0, "eval", "whole", "--lengths", "1", "4", "--repeats", "1", "2", "--json"))
    assert list(errors["error_at_length_repeats"]) == ["1,1", "1,2", "4,1", "4,2"]
    errors = json.loads(said(capsys, 0, "eval", "whole", "--lengths", "7", "--json"))
    assert list(errors["error_at_length_repeats"]) == ["7,1"], "what is not given is as in the picture"
    pictures = said(capsys, 0, "plot", "whole", "--length", "6").split()
    assert [path.split("/")[-1] for path in pictures] == ["learning_curve.png", "memory.png"]


def test_own_model_and_own_loss(own, capsys):
    train = ["train", "own:Mean", "--model", "own:Layers", "--width", "4", *QUICK]
    out = said(capsys, 3, *train, "--max-sequences", "80")
    assert "squared error over 1,000 fresh sequences" in out
    said(capsys, 3, "train", "own:Mean", "--resume", "runs/mean-layers-seed0", "--max-sequences", "320", "--quiet")
    said(capsys, 3, *train, "--max-sequences", "320", "--out", "whole")
    assert_same_run(own / "runs" / "mean-layers-seed0", own / "whole")
    assert load_run(own / "whole")[0].model_options == {"width": 4, "slope": None}
    assert said(capsys, 0, "eval", "whole").startswith("squared error")
    assert said(capsys, 0, "plot", "whole").split()[-1].endswith("answer.png")
    changed = ["train", "own:Mean", "--resume", "whole", "--quiet"]
    said(capsys, 3, *changed, "--slope", "2")
    assert load_run(own / "whole")[0].model_options["slope"] == 2
    said(capsys, 3, *changed, "--slope", "none")
    assert "width: got 5, expected 4 as in whole/config.json" in said(capsys, 2, *changed, "--width", "5")
    assert "model: got 'ntm', expected 'own:Layers'" in said(capsys, 2, *changed, "--model", "ntm")
    assert "task: got 'copy', expected 'own:Mean'" in said(capsys, 2, "train", "copy", "--resume", "whole", "--quiet")
    assert "model_options: got 'engine'" in said(capsys, 2, "eval", "whole", "--engine", "step")


@pytest.mark.parametrize(
    "arguments, text",
    [
        ("nowhere:Task", "task: got 'nowhere:Task', but there is no module nowhere in "),
        ("own:Nobody", "own.py has no Nobody"),
        ("own:NoDataclass", "not a dataclass"),
        ("own:Half", "lacks axes, cases, shown, input_size, output_size, batch"),
        ("own:Odd", "whose field sizes is no option"),
        ("broken:Task", "importing broken raised ZeroDivisionError: division by zero"),
        ("own:Wide", "task: got 'own:Wide', whose inputs have shape (3, 1, 1), expected (3, 1, 2)"),
        ("own:Echo --model own:Clash", "copies: is an option of the task and of the model"),
        ("own:Echo --model own:Tensor", "model: got 'own:Tensor', which gives Tensor, expected a tuple of outputs"),
        ("own:Echo --model own:Nobody", "model: got 'own:Nobody', but"),
        ("own:Echo --model abacus", "model: got 'abacus', expected one of 'ntm' or 'module:Class'"),
        ("copy --mixed-lengths --model own:Layers", "model: got 'own:Layers', which takes no lengths, expected one"),
        ("own:Echo --noisy 3", "unrecognized arguments: 3"),
    ],
)
def test_one_line_says_what_is_wrong(own, capsys, arguments, text):
    (own / "broken.py").write_text("1 / 0")
    error = said(capsys, 2, "train", *arguments.split())
    assert text in error and error.count("\n") == 1 and error.startswith("ntm-fast"), error
    assert not (own / "runs").exists()


def test_found_from_python(own):
    sys.path.insert(0, str(own))
    assert find_task("own:Echo")(copies=3).output_size == 4
    assert find_model("own:Layers")().title == "two layers"
    with pytest.raises(ValueError, match="copies: got 0, expected an int of at least 1"):
        find_task("own:Echo")(copies=0)
