"""The programs: one module per entry point; they do not import each other."""
