"""Speed and memory of this code beside the published way of doing the same work.

Imports every folder below `main.py`; nothing imports it. Begin with `suite.py`.
"""
