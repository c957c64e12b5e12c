"""Third-party packages as they are installed: real metadata on disk, for discovery to find."""

from pathlib import Path

RECIPE = """\
from halfbyte.recipe import Recipe

class Config:
    pass

class Trainer:
    pass

recipe = Recipe(config=Config, trainer=Trainer, summary="a third party's")
"""


def write(
    site: Path, package: str, recipes: dict[str, str], *, version: str = "1.0", code: str = RECIPE
) -> Path:
    """Write the distribution ``package`` with ``code`` as its module and ``recipes`` as its entry points."""
    module = package.replace("-", "_")
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = site / f"{module}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    points = "\n".join(f"{name} = {value}" for name, value in recipes.items())
    (metadata / "entry_points.txt").write_text(f"[halfbyte.recipes]\n{points}\n")
    return site
