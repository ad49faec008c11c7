"""The library does without training, and training without what only its pictures and checkpoints need."""

import subprocess
import sys


def test_the_library_does_not_import_training():
    code = (
        "import sys, ntm_fast; "
        "found = [n for n in sys.modules if n.startswith(('ntm_fast.tasks', 'ntm_fast.training', 'ntm_fast.cli', "
        "'matplotlib', 'safetensors'))]; assert not found, found; "
        "import ntm_fast.training, ntm_fast.cli; "
        "found = [n for n in sys.modules if n.split('.')[0] in ('matplotlib', 'safetensors')]; "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
