"""Generate with one base and several adapters: ``bank.py`` holds the adapters, ``engine.py`` generates tokens."""
