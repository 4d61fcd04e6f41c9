"""Packages of the wheel; everything else about the project is in pyproject.toml.

The configs that users copy live in data/helios of the checkout and travel in the wheel as rslp/_data/helios.
"""

from setuptools import find_packages, setup

SHIPPED = "rslp._data.helios"

setup(
    packages=[*find_packages(include=["rslp", "rslp.*"]), SHIPPED],
    package_dir={SHIPPED: "data/helios"},
    package_data={"": ["**/*.yaml", "**/*.json", "**/*.html", "**/*.css", "py.typed", "*.pyi"]},
)
