"""File names as text that can be written anywhere."""


def readable(name: str) -> str:
    """Return a file name, or a text with file names, as valid Unicode.

    Bytes that are not UTF-8, which Python keeps as surrogates, become backslash escapes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
