"""FX passes over step graphs, imported as ``compileclip.passes``.

Each pass is one file. This version has none yet: the wrapper runs in eager mode.
"""
