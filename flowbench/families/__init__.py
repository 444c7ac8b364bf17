"""One LightningModule per family."""

from flowbench.torchvision_guard import ensure_importable

ensure_importable()

from flowbench.families.autoencoder import Autoencoder, load_autoencoder  # noqa: E402
from flowbench.families.base import FlowModule, NetworkFactory, Samples, Trajectory  # noqa: E402
from flowbench.families.budget import Budget, BudgetLimit, count_flops  # noqa: E402
from flowbench.families.checkpoint import AtomicCheckpointIO, load_checkpoint, read_checkpoint  # noqa: E402
from flowbench.families.flow_matching import FlowMatching  # noqa: E402
from flowbench.families.latent_cfm import LatentCFM  # noqa: E402
from flowbench.families.optimization import OptimizerConfig  # noqa: E402
from flowbench.families.ot_cfm import OTCFM  # noqa: E402
from flowbench.families.source import DatasetSource  # noqa: E402
from flowbench.families.space import LatentSpace, PixelSpace, Space  # noqa: E402
from flowbench.families.starflow import STARFlow  # noqa: E402
from flowbench.families.tarflow import TARFlow  # noqa: E402
from flowbench.families.training import Loss, NonFiniteLossError, TrainingModule  # noqa: E402
from flowbench.families.weighted_cfm import WeightedCFM  # noqa: E402

__all__ = [
    "OTCFM",
    "AtomicCheckpointIO",
    "Autoencoder",
    "Budget",
    "BudgetLimit",
    "DatasetSource",
    "FlowMatching",
    "FlowModule",
    "LatentCFM",
    "LatentSpace",
    "Loss",
    "NetworkFactory",
    "NonFiniteLossError",
    "OptimizerConfig",
    "PixelSpace",
    "STARFlow",
    "Samples",
    "Space",
    "TARFlow",
    "TrainingModule",
    "Trajectory",
    "WeightedCFM",
    "count_flops",
    "load_autoencoder",
    "load_checkpoint",
    "read_checkpoint",
]
