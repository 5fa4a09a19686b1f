"""Search in a folder of person pictures: the index, the engines, queries, the server and its page.

Imports `misc/build/` and below; only `search.py` stands above. Begin with `searcher.py`.
"""
