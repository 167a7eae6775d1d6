"""Training: optimizers, schedules, checkpoints, metrics, and the loop that joins them.

What lives here: whatever turns a model, a stream of batches and a budget into a trained model. What must not: models,
data or file formats of other libraries; the trainer is handed a model, a loader, an optimizer and evaluators.
"""
