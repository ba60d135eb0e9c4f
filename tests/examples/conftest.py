import dataclasses
import json

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from gpt_runs import TEXT, arguments, losses, run

from examples.gpt.core.config import Config
from examples.gpt.core.step import TrainState
from examples.gpt.operations.checkpoints import CHECKPOINTS, Checkpoints
from examples.gpt.operations.run import save_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text file for the runs of `gpt_runs`."""
    file = tmp_path_factory.mktemp("data") / "corpus.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The losses of a run that is not interrupted."""
    out = tmp_path_factory.mktemp("uninterrupted")
    code, output = run(arguments(corpus, out))
    assert code == 0, output
    assert len(losses(out)) == 22
    return losses(out)


@pytest.fixture
def save_run(tmp_path):
    """A function that writes the folder of a run with these parameters."""

    def save(model, params, tokenizer, data=None):
        folder = tmp_path / "out"
        config = dataclasses.replace(Config(), out=folder, model=model, data=data)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.as_json()))
        save_tokenizer(folder, tokenizer)
        with Checkpoints(folder / CHECKPOINTS, config, {}) as checkpoints:
            checkpoints.save(1, TrainState(params, {"count": np.zeros(())}), {})
        return folder

    return save


class Bucket(MemoryFileSystem):
    """S3, in memory."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def bucket():
    """An empty file system for s3:// paths."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store, Bucket.pseudo_dirs = {}, [""]
    return Bucket()
