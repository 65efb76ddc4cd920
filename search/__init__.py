"""The search for the best configuration: candidates, how they are measured, what is the answer.

Imports report/, load/, launch/ and common/; only tune.py imports it.
"""
