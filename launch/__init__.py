"""The launcher behind run_sbatch.py: a plan, the image on every node, the server until its end.

Imports common/.
"""
