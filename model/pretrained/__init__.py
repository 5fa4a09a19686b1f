"""CLIP's weights: reading them from other tools, and exporting them. All forms are converted through OpenAI's names.

Reading: `registry` turns a tag into a path. `archives` reads names and tensors from a file without running its code.
`names` renames them to OpenAI's names, `sizes` and `settings` determine the architecture, and `weights` combines all of
it into checked `Weights`. `loading` copies these into the model. Writing: `export`.
"""
