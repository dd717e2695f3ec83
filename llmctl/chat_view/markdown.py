"""Markdown on a terminal while it is still being written: whole blocks are printed for good, the last one is drawn anew."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

_PER_SECOND = 12


class MarkdownStream:
    """`with MarkdownStream(console) as stream: stream.add(piece)`."""

    def __init__(self, console: Console):
        self._console, self._open = console, ""
        # What does not fit on the screen cannot be drawn anew; its end appears with the whole block. Markdown is parsed
        # when it is drawn, not for every token.
        self._live = Live(
            console=console,
            refresh_per_second=_PER_SECOND,
            transient=True,
            vertical_overflow="crop",
            get_renderable=lambda: Markdown(self._open),
        )

    def __enter__(self) -> MarkdownStream:
        self._live.start()
        return self

    def add(self, piece: str) -> None:
        self._open += piece
        at = end_of_whole_blocks(self._open)
        if at:
            whole, self._open = self._open[:at], self._open[at:]
            self._live.console.print(Markdown(whole))

    def __exit__(self, *failure: object) -> None:
        rest, self._open = self._open, ""  # a last frame that is taller than the screen could not be taken back
        self._live.stop()
        if rest.strip():
            self._console.print(Markdown(rest))


def end_of_whole_blocks(text: str) -> int:
    """How much of a text is blocks that nothing can still change: up to the last blank line outside of a fence or list."""
    end = at = 0
    fence = None
    for line in text.splitlines(keepends=True):
        at += len(line)
        bare = line.strip()
        if bare[:3] in ("```", "~~~"):
            fence = None if fence == bare[:3] else fence or bare[:3]
        elif not bare and fence is None and line.endswith("\n"):
            end = at
    rest = text[end:]
    # A list goes on over blank lines, and is numbered anew when it is cut.
    first = rest.lstrip(" ")[:2]
    goes_on = rest[:1] == " " or not rest or first[:1].isdigit() or first in ("- ", "* ", "+ ")
    return 0 if goes_on else end
