"""Parts of `tools/write_model_zoo.py`: quoted figures, measured numbers, tables and pictures."""
