"""`make quantize` as a person types it: what it would run."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("model", "run"),
    [
        ("tiny", "runs/tiny-w2a16"),
        ("some/model/", "runs/model-w2a16"),  # as a shell completes it
        ("my models/größe 1", "runs/my größe 1-w2a16"),
    ],
)
def test_model_and_run_reach_the_command_whole(model: str, run: str) -> None:
    command = ["make", "--dry-run", "quantize", f"MODEL={model}", "RECIPE=my/w2a16.yaml"]
    root = Path(__file__).parents[1]
    env = {
        name: value for name, value in os.environ.items() if "MAKE" not in name and name != "ARGS"
    }  # make, too, may run this
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=env)
    lines = done.stdout.splitlines()
    words = shlex.split(lines[-1])
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {"--model": model, "--recipe": "my/w2a16.yaml", "--output": run}
