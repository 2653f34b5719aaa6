"""What does a loader worker know before it starts? Imported by the server that forks them, under a name that nobody else has."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # before the working directory, which may hold another `datasets`

import datasets  # noqa: F401
import loaders  # noqa: F401
