"""Notebooks executed headless, rendered to self-contained HTML and indexed."""
