"""Markup that cannot be forged: text is escaped unless `tag` made it, and a completion may well say <script>."""

from __future__ import annotations

from html import escape


class Html(str):
    """Markup made by `tag`."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | bool | None) -> Html:
    """An element. cls_ stands for class, data_x for data-x; an attribute that is None or False is left out."""
    shown = [
        f' {key.removesuffix("_").replace("cls", "class").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    ]
    return Html(f"<{name}{''.join(shown)}>{together(*children)}</{name}>")


def together(*children: str) -> Html:
    """One after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def _short(value: str | float) -> str:
    """Coordinates to a tenth of a pixel."""
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
