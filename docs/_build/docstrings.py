"""Lets mkdocstrings read this package's docstrings, whose roles and equations are those of Sphinx."""

import re
from typing import Any

from griffe import Extension, Object


def to_markdown(docstring: str) -> str:
    """Turn roles into links, ``.. math::`` into blocks of TeX, tables and literal blocks into code."""
    text = re.sub(r"(?<!`)``(?!`)", "`", f"{docstring}\n")
    text = re.sub(r":(?:func|class|meth|attr|data|mod):`(~?)([\w.]+)`", _link, text)
    text = re.sub(r":math:`([^`]+)`", r"`\1`", text)
    text = re.sub(r"^( *)\.\. math::\n((?:\1 +.*\n|\n)+)", r"\1```tex\n\2\1```\n\n", text, flags=re.M)
    text = re.sub(r"^(?P<rule>=+(?: +=+)+)\n(?:.+\n)+?(?P=rule)\n", r"```text\n\g<0>```\n", text, flags=re.M)
    text = re.sub(r"::\n\n(?=    )", ":\n\n", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.M)


def _link(match: re.Match[str]) -> str:
    target = match[2]
    shown = target.rpartition(".")[2] if match[1] or target.startswith("pcnn_lightning.") else target
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


class SphinxRoles(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
