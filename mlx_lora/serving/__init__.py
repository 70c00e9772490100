"""Answers from a model with adapters that come and go: ``bank.py`` holds adapters, ``engine.py`` makes tokens."""
