"""Runs stay short, and one that was not interrupted is there to compare with."""

import signal

import pytest
from helpers.training import SMALL, copied

from ntm_fast.tasks import CopyTask
from ntm_fast.training import loop, train


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C works, though a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _short_evaluation(monkeypatch):
    monkeypatch.setattr(loop, "EVALUATION_SEQUENCES", 2)
    monkeypatch.setattr(CopyTask, "cases", (2, 5))
    monkeypatch.setattr(loop, "draw", lambda *args, **kwargs: [])  # what draws has tests of its own


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The folder of SMALL's run."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw", lambda *args, **kwargs: [])
        train(SMALL, folder, quiet=True)
    return folder


@pytest.fixture
def run_folder(tmp_path, uninterrupted):
    """A copy of it, to be spoiled."""
    return copied(uninterrupted, tmp_path / "run")
