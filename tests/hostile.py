"""What a hostile file would run, for tests that nothing runs it."""

import os


class Trap:
    """An object whose pickle, when it is read, makes the file `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)
