"""Lists the packages for pyproject.toml: `models/` and `configs/` install as `optx.models` and `optx.configs`."""

from setuptools import find_packages, setup

mapped = [
    f"optx.{folder}{suffix}"
    for folder in ("models", "configs")
    for suffix in ["", *(f".{name}" for name in find_packages(folder))]
]
setup(packages=[*find_packages(include=["optx", "optx.*"]), *mapped])
