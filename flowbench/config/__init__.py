"""Configuration: OmegaConf composes, jsonargparse validates and builds."""

from __future__ import annotations

from flowbench.config.compose import Composed, compose, compose_tree, fingerprint, to_yaml
from flowbench.config.errors import ConfigError
from flowbench.config.experiment import Built, Experiment

__all__ = ["Built", "Composed", "ConfigError", "Experiment", "compose", "compose_tree", "fingerprint", "to_yaml"]
