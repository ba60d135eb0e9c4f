import json

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from examples.gpt.checkpoint import FOLDER, Checkpoints
from examples.gpt.config import Config
from examples.gpt.state import TrainState


@pytest.fixture
def save_run(tmp_path):
    """A function that writes the folder of a run which ended with these parameters."""

    def save(model, params, data=None):
        folder = tmp_path / "out"
        config = Config(out=folder, model=model, data=data)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.as_json()))
        with Checkpoints(folder / FOLDER, config, {}) as checkpoints:
            checkpoints.save(1, TrainState(params, {"count": np.zeros(())}), {})
        return folder

    return save


class Bucket(MemoryFileSystem):
    """Stands for S3, in memory."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def bucket():
    """What s3:// is during a test: an empty file system."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store, Bucket.pseudo_dirs = {}, [""]
    return Bucket()
