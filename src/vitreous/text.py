"""Text from elsewhere, made safe to print."""


def escape_text(text: str) -> str:
    r"""Returns a text with what cannot be seen (control characters, turned writing, stray bytes) written out.

    So no name of a file can steer the terminal, or begin a line of its own.

    Example:
        >>> print(escape_text("a\nb.png"))
        a\nb.png
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
