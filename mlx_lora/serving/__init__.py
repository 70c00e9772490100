"""Generating with a model whose adapter can change: ``bank.py`` keeps adapters, ``engine.py`` generates tokens."""
