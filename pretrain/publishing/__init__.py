"""Model directories on their way to a Hub: what may leave, what stands there, one commit, and pushes beside training.

What lives here: checks of a directory (`contents`, `leaks`), the record that says what it is (`record`), the Hub as we
speak to it (`hub`), a release compared with what is there and sent (`releases`), the spool of a running training
(`background`) and the process that empties it (`pushing`). What must not: torch, or making a model directory.
"""
