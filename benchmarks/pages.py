"""Pages of the documentation that benchmarks write a part of."""

from __future__ import annotations

from pathlib import Path


def update_page(page: Path, begin: str, text: str, end: str) -> None:
    """Puts a text between two markers of a page.

    Args:
        page (`Path`): Markdown.
        begin, end (`str`): The markers, which stay.
        text (`str`): With the line ends that it needs.

    Raises:
        SystemExit: If the page has no such place.
    """
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"{page} has no place for what was measured: {begin.strip()} and {end.strip()}.")
    page.write_text(before + begin + text + end + after, encoding="utf-8")
