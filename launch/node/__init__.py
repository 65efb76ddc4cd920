"""What runs on a node: one Python program, sent through the pipe that the step holds open anyway.

Standard library only, Python 3.9 and newer; a node needs no checkout. Each part imports base and
messages, and at most one more; launch/order.py sends the parts that an order needs.
"""
