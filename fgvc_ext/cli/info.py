"""`fgvc-ext info`: `fgvc_ext.info()` as a table."""

from .. import info


def info_command() -> int:
    """Prints one line a fact, names and values in two columns, and returns 0."""
    facts = info()
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0
