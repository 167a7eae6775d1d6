"""The processes of a job on this machine: starting them, passing signals on, seeing that one failed or hangs.

What lives here: what the operating system knows of them. What must not: torch, or what they compute.
"""
