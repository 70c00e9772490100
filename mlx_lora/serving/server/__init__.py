"""Serve one base and its adapters over HTTP: the OpenAI and Anthropic APIs, adapters by name, and a chat page.

``app.create_app`` builds the application from an engine, ``run.serve`` runs it until a signal stops it. It needs the
packages of the extra ``serve``.
"""
