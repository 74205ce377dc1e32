"""Metadata is in pyproject.toml; here is what it cannot say: a wheel carries `configs/` as `detres/configs`."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["detres*"]), "detres.configs", "detres.configs._base"],
      package_dir={"detres.configs": "configs"})
