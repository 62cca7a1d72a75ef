"""The files in examples/accelerate: every key is one that accelerate knows."""

from __future__ import annotations

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from scale.launching import FILES

NAMES = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def test_there_is_a_file_for_each_kind():
    assert {path.stem for path in FILES.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name):
    """It refuses unknown keys of the first level, but takes any of the second without a word."""
    config = ClusterConfig.from_yaml_file(str(FILES / f"{name}.yaml"))
    assert config.distributed_type == DistributedType(NAMES[name])
    assert config.mixed_precision == "bf16"
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_for_and_how_it_is_used(name):
    text = (FILES / f"{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("# "))
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml -m lavender.cli train RUN.yaml" in header
    assert "Not run: on " in header
    assert yaml.safe_load(text)["num_processes"] == (1 if name == "one_gpu" else 8)
