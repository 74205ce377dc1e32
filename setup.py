"""All metadata is in pyproject.toml; this file serves the tools that still ask for it."""

from setuptools import setup

setup()
