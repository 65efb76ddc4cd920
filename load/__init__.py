"""The measuring client behind bench.py: loads, the loop that times them, metrics of the answers.

Imports common/, and launch/ only to run NVIDIA's own programs on a node.
"""
