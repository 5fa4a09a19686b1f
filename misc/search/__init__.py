"""Search in a folder of person pictures: the index, the engines, queries, the server and its page.

The modules may import `misc/builders/` and the rooms below it; only `search.py` imports them. Begin with `searcher.py`.
"""
