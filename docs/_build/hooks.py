"""Shows the notebooks' figures in the docs, under the paths by which the docs' sources name them."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures, which lie outside of the docs' folder."""
    for figure in sorted((Path(config.config_file_path).parent / "notebooks" / "figures").glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Point to the added figures: ``../notebooks/figures/`` is where they lie seen from the sources."""
    return markdown.replace("../notebooks/figures/", "figures/")
