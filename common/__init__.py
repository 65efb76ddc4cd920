"""What every part needs: settings, words and errors, one question over HTTP, signals.

Imports the standard library and python-dotenv, nothing of ours outside this folder.
"""
