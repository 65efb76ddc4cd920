"""The measuring client behind bench.py: loads, the loop that times them, metrics of the answers.

Imports common/, and of launch/ only where NVIDIA's own programs run on a node.
"""
