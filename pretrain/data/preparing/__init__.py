"""Documents to shards: the plan, its parts, who works on them, and what is unfinished."""
