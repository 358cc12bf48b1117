"""What `import fuse` offers."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import fuse


def test_the_trainer_and_its_configuration_come_from_the_package():
    from fuse import PPOConfig, PPOTrainer

    assert (PPOConfig.__module__, PPOTrainer.__module__) == ("fuse.config.ppo", "fuse.trainers.ppo")
    assert set(fuse.__all__) <= set(dir(fuse))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'fuse' has no attribute 'PPOTrainr'"):
        fuse.PPOTrainr  # noqa: B018


def test_version_is_that_of_the_distribution():
    assert fuse.__version__ == version("fuse-rlhf")


@pytest.mark.processes
def test_ops_can_be_asked_without_importing_them_first():
    program = "import fuse; print(fuse.ops.describe()['gae'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "native C++" in result.stdout
