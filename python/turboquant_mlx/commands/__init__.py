"""Programs of the command line: python -m turboquant_mlx ..."""
