"""The search for the best configuration: the candidates, how they are measured, the answer.

Imports report/, load/, launch/ and common/; only tune.py imports it.
"""
