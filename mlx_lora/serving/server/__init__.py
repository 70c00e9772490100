"""One base and its adapters over HTTP: OpenAI's and Anthropic's interfaces, adapters by name, a chat page.

``app.create_app`` builds the application from an engine, ``run.serve`` runs it until it is told to stop. Needs the
packages of the extra ``serve``.
"""
