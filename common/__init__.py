"""What every part needs: settings, messages and errors, single HTTP requests, signals.

Imports the standard library and python-dotenv, nothing of ours outside this folder.
"""
