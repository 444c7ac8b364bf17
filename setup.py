"""What pyproject.toml has no words for: experiments/ and data/ travel inside the package, as flowbench/shipped/."""

from setuptools import find_packages, setup

SHIPPED = {"flowbench.shipped.experiments": "experiments", "flowbench.shipped.data": "data"}

setup(
    packages=[*find_packages(include=["flowbench", "flowbench.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "flowbench": ["py.typed", "reference_results.yaml"],
        "flowbench.shipped.experiments": ["**/*.yaml"],
        # The licence of the embedded images stands in the README.
        "flowbench.shipped.data": ["README.md", "fashion_mnist_mini.npz"],
    },
    include_package_data=False,
)
