"""The command line: a thin layer over the public Python API. ``click`` is used here and nowhere else."""
