"""A run on paper: memory, speed, failures and cost, computed from the numbers of a model and of a machine.

What lives here: arithmetic over plain facts. What must not: torch, models, data, configurations, or anything printed.
The room is low in the house so that the training loop can ask it for a micro-batch, and the verb `plan` for a table.
"""
