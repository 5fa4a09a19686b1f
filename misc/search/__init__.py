"""Search in a folder of person pictures: the index, the engines, queries, the server and its page.

They may import `misc/builders/` and the folders below it; only `search.py` imports them. Begin with `searcher.py`.
"""
