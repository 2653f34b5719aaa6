"""How do a file's bytes become an RGB image? Everything that can be wrong with them has one name here."""


class DataError(ValueError):
    """Something wrong with the data that shows only when they are read, perhaps in a loader's worker."""


class UnreadableImage(DataError):
    """An image that cannot be decoded; the message has its path."""
