"""The streams of an image by name: linear spaces of bytes, each with an index tree of its own."""

MEMORY = "memory"
STATE = "state"
NATIVE_ENTRIES = "native-entries"
NATIVE_LITERALS = "native-literals"
NATIVE_EXCEPTIONS = "native-exceptions"
NATIVE_SUPERSEDED = "native-superseded"
REQUIRED = (MEMORY, STATE, NATIVE_ENTRIES, NATIVE_LITERALS, NATIVE_EXCEPTIONS, NATIVE_SUPERSEDED)
"""Every image has these, empty or not."""
CONFIG_PREFIX = "config/"
"""Config files are streams named ``config/FILE``."""
