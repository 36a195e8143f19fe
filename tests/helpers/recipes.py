"""The recipes train_scripts/*.yaml for tests: their texts and their settings, by name."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / 'train_scripts'
TEXTS = {path.stem: path.read_text() for path in sorted(FOLDER.glob('*.yaml'))}
RECIPES: dict[str, dict[str, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
