"""The version of the installed package."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("blockhess")
except importlib.metadata.PackageNotFoundError:  # run from the source folder
    __version__ = "0+source"
