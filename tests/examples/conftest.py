import contextlib
import dataclasses
import functools
import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from gpt_runs import TEXT, make_config, read_losses, run_command, run_flags

from examples.gpt.core.config import Config
from examples.gpt.operations.checkpoints import open_checkpointer
from examples.gpt.operations.run import save_tokenizer


@pytest.fixture
def tiny_config(tmp_path):
    """Return a function that makes a tiny 4-step config with the given overrides."""
    (tmp_path / "corpus.txt").write_text(TEXT)
    values = {"data": tmp_path / "corpus.txt", "out": tmp_path / "out", "steps": 4}
    values |= {"warmup": 1, "layers": 1, "heads": 2, "width": 16, "context": 16}
    values |= {"batch": 8, "refresh_batch": 4, "groups": 4, "log_every": 1}
    return lambda **changes: make_config(**(values | {"validation_batches": 2} | changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return the path of a text file to train on."""
    file = tmp_path_factory.mktemp("data") / "corpus.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def single_device_losses(corpus, tmp_path_factory):
    """Return a function that maps an optimizer name to losses of a single-device run."""

    @functools.cache
    def train(optimizer):
        out = tmp_path_factory.mktemp(optimizer)
        code, output = run_command(run_flags(corpus, out, optimizer=optimizer))
        assert code == 0, output
        assert len(read_losses(out)) == 22
        return read_losses(out)

    return train


@pytest.fixture(scope="module")
def uninterrupted_losses(single_device_losses):
    """Return the losses of an uninterrupted single-device run with `sophia_g`."""
    return single_device_losses("sophia_g")


@pytest.fixture
def save_run(tmp_path):
    """Return a function that writes a run's output folder with a checkpoint of `params`."""

    def save(model, params, tokenizer, data=None):
        folder = tmp_path / "out"
        config = dataclasses.replace(Config(), out=folder, model=model, data=data)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.as_json()))
        save_tokenizer(folder, tokenizer)
        with contextlib.closing(open_checkpointer(folder, config.output)) as checkpointer:
            checkpointer.save_checkpointables_async(1, {"params": params})
        return folder

    return save


class MemoryS3(MemoryFileSystem):
    """An in-memory file system for s3:// paths."""

    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def bucket():
    """Register and return an empty in-memory file system for s3:// paths."""
    fsspec.register_implementation("s3", MemoryS3, clobber=True)
    MemoryS3.store, MemoryS3.pseudo_dirs = {}, [""]
    return MemoryS3()
