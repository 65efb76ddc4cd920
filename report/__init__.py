"""Results of bench.py for people: tables, charts, the page, two folders compared.

Imports load/ (the names of a run's metrics) and common/.
"""
