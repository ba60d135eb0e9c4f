"""Configs, presets and the command line."""

import dataclasses
import json
from typing import get_args

import pytest
from gpt_runs import make_config, run_module

from examples.gpt.core.config import Config, ConfigError, ModelConfig, Optimizer
from examples.gpt.presets import PRESETS, parse, preset_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": 3, "refresh_batch": 4}, "`groups` must divide `refresh.* 3 and 4"),
        ({"accumulate": 3}, "`accumulate` must divide `batch`.* 3 and 64"),
        ({"loss_chunk": -1}, "`loss_chunk` must be positive, got -1"),
        ({"weight_decay": "nan"}, "`weight_decay` must be at least 0, got nan"),
        ({"share": 1.5}, "`share` must be less than 1, got 1.5"),
        ({"share": 0.1, "gamma": 0.1}, "`gamma` or `share`.* 0.1 and 0.1 for sophia_g"),
        ({"optimizer": "lion", "gamma": 0.1}, "neither, got 0.1 and None for lion"),
        ({"optimizer": "lion", "nesterov": True}, "`nesterov` must not be True for lion"),
        (
            {"optimizer": "nadamw", "nesterov": False},
            "`nesterov` must not be False for nad",
        ),
        ({"warmup": 800}, r"`warmup` must be less than `steps`.* 800 \+ 0 and 800"),
        ({"schedule": "wsd", "decay": 721}, r"at most `steps`, got 80 \+ 721 and 800"),
        ({"architecture": "neox", "heads": 16}, "`width` / `heads` .* got 64 / 16"),
        ({"compare": ("adamw", "sophia_g")}, "`compare` must list distinct"),
        ({"compare": ("adamw", "adamw")}, "`compare` must list distinct"),
        ({"init_from": "a", "resume_from": "b"}, "mutually exclusive"),
        ({"coordinator": "here:1"}, "`num_processes` and `process_id` must be given tog"),
    ],
)
def test_config_check_rejects_invalid_values(values, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**values).check()


def test_flags_override_the_preset():
    config = parse(["--preset", "gpt2-355m", "--batch", "32", "--optimizer=adamw"])
    preset = preset_config("gpt2-355m", "adamw")
    assert config.recipe.learning_rate == 3e-4
    assert config.training.batch == 32
    training = dataclasses.replace(config.training, batch=480)
    assert dataclasses.replace(config, training=training) == preset
    assert parse([]) == preset_config() == Config()


@pytest.mark.parametrize("preset", ["bytes", "gpt2-125m"])
@pytest.mark.parametrize("optimizer", ["sophia_g", "sophia_h"])
def test_share_flag_unsets_gamma_of_the_preset_and_vice_versa(preset, optimizer):
    for given in ({"share": 0.3, "gamma": None}, {"share": None, "gamma": 0.3}):
        flag = {name: value for name, value in given.items() if value is not None}
        config = make_config(preset=preset, optimizer=optimizer, **flag)
        config.check()
        assert {name: getattr(config.recipe, name) for name in given} == given


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_configs_are_valid_for_every_optimizer(preset):
    for optimizer in get_args(Optimizer):
        config = preset_config(preset, optimizer)
        config.check()
        assert (config.preset, config.optimizer) == (preset, optimizer)
        assert None not in dataclasses.astuple(config.recipe)[:4]
    values = json.loads(json.dumps(config.as_json()))
    model = ModelConfig(**{name: values[name] for name in vars(config.model)})
    assert model == config.model


@pytest.mark.parametrize(
    ("devices", "values", "expected"),
    [
        (1, {}, (16, 16)),
        (8, {}, (16, 16)),
        (32, {}, (32, 32)),
        (20, {}, (20, 20)),
        (32, {"groups": 1}, (32, 1)),
        (1, {"groups": 8}, (16, 8)),
        (8, {"refresh_batch": 80}, (80, 80)),
        (8, {"batch": 8}, (8, 8)),
    ],
)
def test_default_groups_are_a_multiple_of_the_device_count(devices, values, expected):
    config = make_config(**({"batch": 480} | values)).with_resolved_defaults(100, devices)
    assert (config.refresh.refresh_batch, config.refresh.groups) == expected


@pytest.mark.parametrize("devices", [1, 12, 64])
@pytest.mark.parametrize("groups", [None, 4])
def test_resumed_run_uses_the_saved_number_of_groups_by_default(devices, groups):
    saved = make_config(batch=480, groups=groups).with_resolved_defaults(100).as_json()
    config = make_config(batch=480).with_resolved_defaults(100, devices, saved)
    assert (config.refresh.refresh_batch, config.refresh.groups) == (16, groups or 16)


def test_help_shows_the_values_of_the_given_preset_as_defaults():
    text = run_module("examples.gpt", "--help", "--preset", "gpt2-125m").stdout
    assert "(default: 0.0006)" in text


@pytest.mark.slow
def test_command_prints_config_errors_without_a_traceback(tmp_path):
    result = run_module("examples.gpt", "--data", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: `data` must be a text file or a folder")
    result = run_module("examples.gpt", "--optimizer", "sofia")
    assert result.returncode != 0
    assert "sophia_g" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
