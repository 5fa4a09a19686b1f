"""CLIP's weights, in from every tool and out to every tool. OpenAI's names are what all forms meet in.

In: `registry` turns a tag into a path, `archives` a file into names and tensors without running code of it, `names`
those into OpenAI's, `settings` reads what lies beside them, and `weights` makes checked `Weights` of it all, which
`loading` puts into the model. Out: `export`.
"""
