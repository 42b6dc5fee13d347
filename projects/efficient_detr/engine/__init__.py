"""Training, evaluation and prediction from a LazyConfig."""
