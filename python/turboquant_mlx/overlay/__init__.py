"""Everything that replaces a name of another program: mlx-lm's attention, its files, its server."""
