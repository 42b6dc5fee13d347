"""Build script. What is static stands in pyproject.toml; only what is computed belongs here."""

from setuptools import setup

setup()
