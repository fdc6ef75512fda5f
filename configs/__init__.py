"""Recipes that ship with optx, as YAML, and the published configs of models, `models/<name>.json`."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"


def model_names() -> list[str]:
    """Published configs that ship with optx."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def model_path(name: str) -> Path:
    """The config.json of a published model."""
    return MODELS / f"{name}.json"
