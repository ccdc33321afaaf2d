"""The programs: one module for each entry point; none imports another."""
