"""flowbench."""

from flowbench.core import torchvision_guard as torchvision_guard
