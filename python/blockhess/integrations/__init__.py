"""Interfaces to other packages; each module imports its package, so none is needed until its module is imported."""
