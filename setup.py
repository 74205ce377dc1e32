"""Metadata is in pyproject.toml; here is what it cannot say: a wheel carries `configs/` as `detres/configs`."""

from pathlib import Path

from setuptools import find_packages, setup

folders = [path for path in (Path("configs"), *sorted(Path("configs").rglob("*"))) if path.is_dir()]
setup(packages=[*find_packages(include=["detres*"]), *(f"detres.{'.'.join(folder.parts)}" for folder in folders)],
      package_dir={"detres.configs": "configs"})
