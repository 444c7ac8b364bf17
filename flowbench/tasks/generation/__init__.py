"""Images and points: likelihood, paths, training pairs, autoencoders and conditions of flows, and their references."""

from flowbench.tasks.generation.condition_agreement import ConditionAgreement
from flowbench.tasks.generation.head_likelihood import FewStepLikelihood
from flowbench.tasks.generation.latent_bound import LatentBound
from flowbench.tasks.generation.likelihood import NegativeLogLikelihood
from flowbench.tasks.generation.map_error import MapError
from flowbench.tasks.generation.paths import PathStraightness
from flowbench.tasks.generation.reconstruction import Reconstruction
from flowbench.tasks.generation.references import Floor, Gaussian, Mixture, Noise
from flowbench.tasks.generation.training_pairs import TrainingPairs

__all__ = [
    "ConditionAgreement",
    "FewStepLikelihood",
    "Floor",
    "Gaussian",
    "LatentBound",
    "MapError",
    "Mixture",
    "NegativeLogLikelihood",
    "Noise",
    "PathStraightness",
    "Reconstruction",
    "TrainingPairs",
]
