import dataclasses
import json

import numpy as np
import pytest

from examples.gpt.checkpoint import FOLDER, Checkpoints
from examples.gpt.state import TrainState


@pytest.fixture
def save_run(tmp_path):
    """A function that writes the folder of a run which ended with these parameters."""

    def save(config, params):
        folder = tmp_path / "out"
        config = dataclasses.replace(config, out=folder)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.as_json()))
        with Checkpoints(folder / FOLDER, config, {}) as checkpoints:
            checkpoints.save(1, TrainState(params, {"count": np.zeros(())}), {})
        return folder

    return save
